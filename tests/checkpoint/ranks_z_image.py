"""Run on 2 ranks: weights of the stock class, sliced through the table, make the same model under tp=2.

Argument: a file with what the test took from the stock class.
"""

import sys

import torch

from iomm.checkpoint.names import family_table
from iomm.config import GeneratorConfig, ParallelConfig
from iomm.model.single_stream import SingleStreamDiT
from iomm.parallel import mesh as mesh_module
from iomm.parallel.backend import Layers, transformer_config


def main() -> None:
    given = torch.load(sys.argv[1])
    config, parallel = GeneratorConfig(**given["config"]), ParallelConfig(tp=2)
    table = family_table(config)
    mesh = mesh_module.start(parallel)
    transformer = transformer_config(config.hidden_size, config.heads, torch.float64, mesh, parallel)
    ours = SingleStreamDiT(config, Layers(transformer, mesh))

    def of_this_rank(name: str, theirs: dict[str, torch.Tensor]) -> torch.Tensor:
        whole = table.to_ours(name, theirs.__getitem__)
        return table.slice(name, whole, mesh.tp_rank, mesh.tp_size)

    with torch.no_grad():
        for name, weight in ours.named_parameters():
            weight.copy_(of_this_rank(name, given["weights"]))
    output = ours(*given["inputs"])
    (output * given["direction"]).sum().backward()
    assert_near(output, given["output"])
    for name, weight in ours.named_parameters():
        assert_near(weight.grad, of_this_rank(name, given["gradients"]))
    mesh.barrier()
    mesh_module.stop()


def assert_near(ours: torch.Tensor | None, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


if __name__ == "__main__":
    main()
