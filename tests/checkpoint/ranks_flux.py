"""Run on 2 ranks: weights of the stock class, sliced through the table, make the same model under tp=2.

Argument: a file with what the test took from the stock class (it is not imported here, which saves time).
"""

import sys

import torch

from iomm.checkpoint.names import family_table
from iomm.config import GeneratorConfig, ParallelConfig
from iomm.model.mmdit import MMDiT
from iomm.parallel import mesh as mesh_module
from iomm.parallel.backend import Layers, transformer_config


def main() -> None:
    given = torch.load(sys.argv[1])
    config, x = GeneratorConfig(**given["config"]), given["inputs"]
    table, dtype = family_table(config), torch.float64
    parallel = ParallelConfig(tp=2)
    mesh = mesh_module.start(parallel)
    ours = MMDiT(
        config, Layers(transformer_config(config.hidden_size, config.heads, dtype, mesh, parallel), mesh)
    )

    def of_this_rank(name: str, theirs: dict[str, torch.Tensor]) -> torch.Tensor:
        whole = table.to_ours(name, theirs.__getitem__)
        return table.slice(name, whole, mesh.tp_rank, mesh.tp_size)

    with torch.no_grad():
        for name, weight in ours.named_parameters():
            weight.copy_(of_this_rank(name, given["weights"]))
    output = ours(
        x["x"], x["t"], x["condition"], x["positions"], pooled_BP=x["pooled"], guidance_B=x["guidance"]
    )
    (output * given["weighting"]).sum().backward()
    torch.testing.assert_close(
        output, given["output"], rtol=0, atol=1e-10 * given["output"].abs().max().item()
    )
    for name, weight in ours.named_parameters():
        expected = of_this_rank(name, given["gradients"])
        torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
    mesh.barrier()
    mesh_module.stop()


if __name__ == "__main__":
    main()
