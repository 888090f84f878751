"""Run on 2 ranks: emulated FP8 under tp=2, without and with sequence parallelism, equals the emulation of
whole layers, over two steps with the scales moved between them."""

from typing import Any

import torch
from torch import Tensor

from iomm.config import Fp8Config, ParallelConfig
from iomm.parallel import mesh as mesh_module
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.fp8 import finish_fp8_step, fp8_state, use_fp8
from iomm.parallel.fp8_emulation import Delayed, emulation
from tests.parallel.ranks_layers import HEADS, part, whole_weight

HIDDEN, TOKENS, SAMPLES = 256, 6, 2  # parts of 128 channels: blocks follow the whole tensor


def block_of(layers: Layers, settings: Fp8Config) -> Any:
    """Column -> tanh -> row -> replicated, with the weights of their names."""
    names = {"column": layers.column, "row": layers.row, "replicated": layers.replicated}
    block = torch.nn.ModuleDict({name: make(HIDDEN, HIDDEN) for name, make in names.items()})
    for name, weight in block.named_parameters():
        axis = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        whole = whole_weight(name, [HIDDEN] * weight.ndim) * HIDDEN**-0.5
        weight.data.copy_(part(whole, axis, layers.mesh.tp_rank))
    layers.mark_partial_gradients(block)
    assert len(use_fp8(block, settings)) == 3
    return block


def run(block: Any, x_LBD: Tensor) -> Tensor:
    return block["replicated"](block["row"](torch.tanh(block["column"](x_LBD))))


class Whole:
    """The same block in one piece."""

    def __init__(self, settings: Fp8Config) -> None:
        self.fp8 = {name: emulation(settings, frozenset(), None) for name in ("column", "row", "replicated")}
        self.weights = {}
        for name in self.fp8:
            for kind, ndim in (("weight", 2), ("bias", 1)):
                full = whole_weight(f"{name}.{kind}", [HIDDEN] * ndim) * HIDDEN**-0.5
                self.weights[f"{name}.{kind}"] = full.requires_grad_()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.fp8[name](x, self.weights[f"{name}.weight"]) + self.weights[f"{name}.bias"]

    def __call__(self, x_LBD: Tensor) -> Tensor:
        return self.linear("replicated", self.linear("row", torch.tanh(self.linear("column", x_LBD))))

    def push(self) -> None:
        for fp8 in self.fp8.values():
            if isinstance(fp8, Delayed):
                fp8.push(fp8.amax_history_H3[0].clone())


def check(recipe: Any, mesh: Any, *, sequence_parallel: bool) -> None:
    settings = Fp8Config(recipe=recipe, keep=(), amax_history=4)
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    layers = Layers(transformer_config(HIDDEN, HEADS, torch.float64, mesh, parallel), mesh)
    block, whole = block_of(layers, settings), Whole(settings)
    for step in range(2):
        x_LBD = whole_weight(f"x{step}", [TOKENS, SAMPLES, HIDDEN])
        mine = x_LBD.chunk(2)[mesh.tp_rank] if sequence_parallel else x_LBD
        mine, theirs = mine.clone().requires_grad_(), x_LBD.clone().requires_grad_()
        block.zero_grad()
        y, expected = run(block, mine), whole(theirs)
        weighting = whole_weight(f"w{step}", list(x_LBD.shape))
        gradients = torch.autograd.grad((expected * weighting).sum(), [theirs, *whole.weights.values()])
        (y * (weighting.chunk(2)[mesh.tp_rank] if sequence_parallel else weighting)).sum().backward()
        of_tokens = (lambda v: v.chunk(2)[mesh.tp_rank]) if sequence_parallel else (lambda v: v)
        torch.testing.assert_close(y, of_tokens(expected), msg=f"{recipe} {step}")
        torch.testing.assert_close(mine.grad, of_tokens(gradients[0]), msg=f"{recipe} {step}")
        for name, gradient in zip(whole.weights, gradients[1:], strict=True):
            weight = block.get_parameter(name)
            grad = weight.grad.clone()
            if weight.sequence_parallel:
                torch.distributed.all_reduce(grad, group=mesh.groups.tp)
            axis = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
            torch.testing.assert_close(
                grad, part(gradient, axis, mesh.tp_rank), msg=f"{recipe} {step} {name}"
            )
        finish_fp8_step(block, mesh)
        whole.push()
    for name, value in fp8_state(block).items():
        layer, _, key = name.partition(".")
        reference = whole.fp8[layer].amax_state()  # type: ignore[operator]
        torch.testing.assert_close(value, reference[key])


def main() -> None:
    mesh = mesh_module.start(ParallelConfig(tp=2))
    for recipe in ("delayed", "current", "blockwise"):
        for sequence_parallel in (False, True):
            check(recipe, mesh, sequence_parallel=sequence_parallel)
    mesh.barrier()
    mesh_module.stop()


if __name__ == "__main__":
    main()
