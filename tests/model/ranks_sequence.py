"""Run on 2 ranks: tensor- and sequence-parallel generators, in chunks and with activations recomputed, equal
the whole one in outputs and in all gradients.

Prints the bytes of activations that a rank keeps for the backward pass.
"""

import copy
import dataclasses
import functools
import json
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from iomm.config import GeneratorConfig, ParallelConfig
from iomm.model import recompute
from iomm.parallel import mesh as mesh_module
from iomm.parallel.mesh import Mesh
from tests.model.small_models import (
    FLUX,
    Z_IMAGE,
    copy_weights,
    inputs,
    make,
    perturbed,
    relay,
    saved_bytes,
    slice_like,
    stages,
)

TP = 2
FOUR_HEADS = dict(heads=4, rope_axes=(4, 2, 2))
CONFIGS = {
    "flux": dataclasses.replace(FLUX, **FOUR_HEADS),
    "flux without single blocks": dataclasses.replace(FLUX, **FOUR_HEADS, double_blocks=3, single_blocks=0),
    "z_image": dataclasses.replace(Z_IMAGE, hidden_size=48, heads=4, rope_axes=(4, 4, 4)),
}
# rows, columns, condition tokens: odd T; for Z-Image slices that are pads only, and slices that are not
SIZES = ((2, 3, 5), (4, 10, 37))
# sequence parallelism, recomputation, pipeline ranks, virtual stages, whether rows are ragged
CASES = (
    (False, "none", 1, 1, True),
    (False, "selective", 3, 1, False),
    (True, "none", 3, 1, True),
    (True, "none", 1, 1, False),
    (True, "selective", 1, 1, True),
    (True, "full", 1, 3, False),
)


def alone(mesh: Mesh) -> Mesh:
    """This process as if it were the only one."""
    groups = [dist.new_group([rank]) for rank in range(mesh.world_size)]
    mine = copy.copy(mesh.groups)
    mine.tp = groups[mesh.rank]
    return dataclasses.replace(mesh, tp_rank=0, tp_size=1, groups=mine)


def ragged(samples: int, tokens: int) -> Tensor:
    """Rows of which all, every third, and the first token count."""
    attend = torch.ones(samples, tokens, dtype=torch.bool)
    attend[1] = torch.arange(tokens) % 3 == 1
    attend[2, 1:] = False
    return attend


def check(config: GeneratorConfig, size: tuple[int, int, int], mesh: Mesh, solo: Mesh) -> None:
    """All cases of one model and size against the whole model, which each rank computes by itself."""
    whole = perturbed(make(config, mesh=solo))
    x, t, condition, positions = inputs(3, *size)
    weighting = torch.randn(x.shape, dtype=x.dtype)
    for attend in (None, ragged(*condition.shape[:2])):
        whole.zero_grad()
        wanted = condition.clone().requires_grad_()
        out = whole(x, t, wanted, positions, attend)
        (out * weighting).sum().backward()
        for sequence_parallel, mode, pp, virtual, is_ragged in CASES:
            if is_ragged != (attend is not None):
                continue
            parallel = ParallelConfig(tp=TP, sequence_parallel=sequence_parallel, recompute=mode)
            chunks = stages(config, pp, virtual)
            parts = [make(config, parallel=parallel, mesh=mesh, chunks=mine) for mine in chunks]
            for part in parts:
                copy_weights(part, whole, mesh.tp_rank, TP)
            given = x, t, condition.clone().requires_grad_(), positions, attend
            torch.testing.assert_close(relay(parts, chunks, given, weighting), out, **TOLERANCE)
            torch.testing.assert_close(given[2].grad, wanted.grad, **TOLERANCE)
            full = dict(whole.named_parameters())
            for name, weight in (named for part in parts for named in part.named_parameters()):
                expected = full[name].grad
                assert (weight.grad is None) == (expected is None), name
                if weight.grad is None or expected is None:
                    continue
                if weight.sequence_parallel:  # as Megatron's finalize_model_grads does
                    dist.all_reduce(weight.grad, group=mesh.groups.tp)
                torch.testing.assert_close(
                    weight.grad, slice_like(weight, expected, mesh.tp_rank, TP), **TOLERANCE, msg=name
                )


TOLERANCE = dict(rtol=1e-10, atol=1e-10)


def activation_bytes(mesh: Mesh) -> dict[str, int]:
    """Saved by one forward pass of the whole model on this rank, by layout."""
    # Selectively kept results show up in the count only if asked to.
    recompute.checkpoint = functools.partial(recompute.checkpoint, respect_saved_tensors_hooks=True)
    saved, given = {}, inputs(2, 8, 8, 32)
    for family in ("flux", "z_image"):
        for sequence_parallel in (False, True):
            for mode in ("none", "selective", "full"):
                parallel = ParallelConfig(tp=TP, sequence_parallel=sequence_parallel, recompute=mode)
                name = f"{family} {'sp' if sequence_parallel else 'tp'} {mode}"
                saved[name] = saved_bytes(make(CONFIGS[family], parallel=parallel, mesh=mesh), given)
    return saved


def main() -> None:
    mesh = mesh_module.start(ParallelConfig(tp=TP))
    solo = alone(mesh)
    for config in CONFIGS.values():
        for size in SIZES:
            check(config, size, mesh, solo)
    saved = activation_bytes(mesh)
    if mesh.rank == 0:
        sys.stdout.write(f"SAVED {json.dumps(saved)}\n")
    mesh.barrier()
    mesh_module.stop()


if __name__ == "__main__":
    main()
