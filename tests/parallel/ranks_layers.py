"""Run on 2 ranks: a column -> head norm -> row block under tp=2 equals the block computed whole."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import OptimizerConfig, ParallelConfig, TrainConfig
from iomm.parallel import mesh as mesh_module
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh

HIDDEN, HEADS, HEAD = 8, 4, 4


class Block(nn.Module):
    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.column = layers.column(HIDDEN, HEADS * HEAD)
        self.norm = layers.head_norm(HEAD)
        self.row = layers.row(HEADS * HEAD, HIDDEN)
        self.replicated = layers.replicated(HIDDEN, HIDDEN)

    def forward(self, x_BD: Tensor) -> Tensor:
        q_BHK = self.column(self.replicated(x_BD)).unflatten(-1, (-1, HEAD))
        q_BHK = functional.rms_norm(q_BHK, (HEAD,), self.norm(), 1e-6)
        return self.row(torch.tanh(q_BHK).flatten(-2))


def whole_weight(name: str, shape: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def reference(x_BD: Tensor, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Gradients (and the output) of the block with whole weights, in plain torch."""
    w = {name: whole_weight(name, shape).requires_grad_() for name, shape in shapes.items()}
    x_BD = x_BD.clone().requires_grad_()
    linear = torch.nn.functional.linear
    h = linear(
        linear(x_BD, w["replicated.weight"], w["replicated.bias"]), w["column.weight"], w["column.bias"]
    )
    q = torch.nn.functional.rms_norm(h.unflatten(-1, (HEADS, HEAD)), (HEAD,), w["norm.weight"], 1e-6)
    y = linear(torch.tanh(q).flatten(-2), w["row.weight"], w["row.bias"])
    y.square().sum().backward()
    return {"output": y.detach(), "input": x_BD.grad, **{n: v.grad for n, v in w.items()}}  # type: ignore[dict-item]


def check_copies(mesh: Mesh, parallel: ParallelConfig) -> None:
    """Gradients that differ between ranks, as a GPU's rounding makes them: the copies stay one."""
    module = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
    for name, weight in module.named_parameters():
        weight.data.copy_(whole_weight(name, list(weight.shape)))
        weight.copied_over_tp = True  # type: ignore[attr-defined]
    transformer = transformer_config(HIDDEN, HEADS, torch.float64, mesh, parallel)
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=1)
    train = TrainConfig(steps=4, global_batch_images=1, micro_batch_images=1, precision="fp64")
    made = Engine(module, transformer, optimizer, train, parallel, mesh)
    for step in range(3):
        x_BD = whole_weight(f"x{step}", [5, HIDDEN])
        noise_BD = whole_weight(f"noise{step}{mesh.tp_rank}", [5, HIDDEN])

        def forward(
            inner: nn.Module, _: Tensor | None, scale: float, x_BD: Tensor = x_BD, noise_BD: Tensor = noise_BD
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return scale * inner(x_BD + 0.1 * noise_BD).square().mean(), {}

        made.step(forward, [1.0])
    for weight in module.parameters():
        mine, other = mesh.gather_objects(weight.detach())
        assert torch.equal(mine, other)


def main() -> None:
    parallel = ParallelConfig(tp=2, distributed_optimizer=False)
    mesh = mesh_module.start(parallel)
    assert (mesh.tp_size, mesh.dp_size, mesh.tp_rank) == (2, 1, mesh.rank)
    assert mesh.any_rank(mesh.rank == 1) and not mesh.any_rank(False)
    assert mesh.broadcast_object(mesh.rank) == 0
    assert mesh.gather_objects(mesh.rank) == [0, 1]
    layers = Layers(transformer_config(HIDDEN, HEADS, torch.float64, mesh, parallel), mesh)
    assert layers.heads_per_rank(HEADS) == 2
    block, shapes = Block(layers), {}
    split = {}
    for name, weight in block.named_parameters():
        split[name] = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        shapes[name] = list(weight.shape)
        if split[name] is not None:
            shapes[name][split[name]] *= 2
    x_BD = whole_weight("x", [5, HIDDEN])
    expected = reference(x_BD, shapes)
    for name, weight in block.named_parameters():
        weight.data.copy_(part(whole_weight(name, shapes[name]), split[name], mesh.tp_rank))
    x_BD.requires_grad_()
    y = block(x_BD)
    y.square().sum().backward()
    torch.testing.assert_close(y.detach(), expected["output"])
    torch.testing.assert_close(x_BD.grad, expected["input"])
    for name, weight in block.named_parameters():
        torch.testing.assert_close(weight.grad, part(expected[name], split[name], mesh.tp_rank))
    check_copies(mesh, parallel)
    mesh.barrier()
    mesh_module.stop()


def part(whole: Tensor, dim: int | None, rank: int) -> Tensor:
    return whole if dim is None else whole.chunk(2, dim)[rank]


if __name__ == "__main__":
    main()
