"""What a rank's optimizer steps: parts of weights in full precision, found by the weight's name.

Megatron keeps them in many shapes: the weight itself (fp32, fp64), an fp32 copy (bf16), a slice of either
(distributed optimizer: a data-parallel rank steps one contiguous part of each buffer), whole weights dealt to
ranks (Muon). `Piece` is all of these, so that the average of the weights and the checkpoint need to know
none.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iomm.parallel import cpu
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402


@dataclass(frozen=True)
class Piece:
    """The part of one weight that this rank steps."""

    name: str  # of the weight, the same in every layout
    weight: nn.Parameter  # what the layers compute with; this tensor-parallel rank's shard
    start: int  # the part, as a range of the flattened weight
    stop: int
    master: Tensor  # the same numbers in full precision, flat or of the weight's shape
    moments: dict[str, Any]  # the optimizer's state of it
    replicas: int  # how many data-parallel ranks step this very part

    def of_weight(self) -> Tensor:
        """The part of the weight that the layers compute with, flat; a view."""
        return self.weight.data.view(-1)[self.start : self.stop]


def leaves(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers that hold parameters, inside chained ones."""
    for part in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
        if part is optimizer:
            yield part
        else:
            yield from leaves(part)


def pieces(part: Any, names: Mapping[nn.Parameter, str], replicas: int) -> Iterator[Piece]:
    """What one of Megatron's optimizers steps on this rank."""
    for weight, master in weights_and_masters(part):
        start, stop = 0, weight.numel()
        if isinstance(part, DistributedOptimizer):
            owned = part._get_model_param_range_map(weight)["param"]
            start, stop = owned.start, owned.end
        yield Piece(names[weight], weight, start, stop, master, part.optimizer.state[master], replicas)


def weights_and_masters(part: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What one of Megatron's optimizers steps on this rank: the weight, and its full-precision (part of a)
    master."""
    if part.is_stub_optimizer:
        return
    groups = part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        for weight, (group, place) in part.model_param_group_index_map.items():
            yield weight, groups[group]["params"][place]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for weights, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(weights, masters, strict=True)
        for weights in part.fp32_from_fp32_groups:
            yield from zip(weights, weights, strict=True)
    else:
        for group in groups:
            yield from zip(group["params"], group["params"], strict=True)


Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the elements [start, stop) of a row-major tensor into boxes, in their order in memory.

    Returns:
        (offset, size) of each, at most 2 * dimensions - 1 of them.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    inner = math.prod(shape[1:])
    first_whole, end_whole = -(-start // inner), stop // inner
    if first_whole > end_whole:  # inside one row
        return _in_row(shape, end_whole, start - end_whole * inner, stop - end_whole * inner)
    out = []
    if start < first_whole * inner:
        out += _in_row(shape, first_whole - 1, start - (first_whole - 1) * inner, inner)
    if end_whole > first_whole:
        rest = tuple(shape[1:])
        out.append(((first_whole, *(0 for _ in rest)), (end_whole - first_whole, *rest)))
    if stop > end_whole * inner:
        out += _in_row(shape, end_whole, 0, stop - end_whole * inner)
    return out


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop)]


def sharded_pieces(
    tensors: Mapping[str, Tensor], owned: Sequence[Piece], prefix: str, mesh: Mesh
) -> dict[str, list[ShardedTensor]]:
    """Describe what belongs to pieces for a sharded checkpoint, as boxes of the whole weight.

    Args:
        tensors: by the name of the weight, each of as many elements as the piece of that name.
        owned: the pieces.
        prefix: of the key inside the checkpoint, before the name.
        mesh: where this rank stands.
    """
    by_name = {piece.name: piece for piece in owned}
    return {name: list(_boxes_of(t, by_name[name], prefix + name, mesh)) for name, t in tensors.items()}


def _boxes_of(tensor: Tensor, piece: Piece, key: str, mesh: Mesh) -> Iterator[ShardedTensor]:
    weight, flat, place = piece.weight, tensor.detach().view(-1), 0
    whole, origin, tp_replica = list(weight.shape), [0] * weight.ndim, mesh.tp_rank
    if getattr(weight, "tensor_model_parallel", False):
        axis, tp_replica = weight.partition_dim, 0  # type: ignore[attr-defined]
        origin[axis], whole[axis] = mesh.tp_rank * whole[axis], mesh.tp_size * whole[axis]
    if getattr(weight, "shared_by_all", False):  # the world is its data-parallel group
        replica = (0, 0, mesh.rank if piece.replicas > 1 else 0)
    else:
        replica = (0, tp_replica, mesh.dp_rank if piece.replicas > 1 else 0)
    for offset, size in boxes(weight.shape, piece.start, piece.stop):
        count = math.prod(size)
        yield ShardedTensor(
            key=key,
            data=flat[place : place + count].view(size),
            dtype=tensor.dtype,
            local_shape=size,
            global_shape=tuple(whole),
            global_offset=tuple(o + b for o, b in zip(origin, offset, strict=True)),
            axis_fragmentations=None,  # the boxes make no regular grid
            replica_id=replica,
        )
        place += count


def state_tensors(owned: Sequence[Piece]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state in tensors: by key (`exp_avg`, `exp_avg_sq`, `momentum_buffer`, and `fp32_param`
    for masters that are no views of the weight), then by the weight's name."""
    out: dict[str, dict[str, Tensor]] = {}
    for piece in owned:
        found = {k: v for k, v in piece.moments.items() if isinstance(v, Tensor) and v.ndim > 0}
        if piece.master.dtype != piece.weight.dtype:
            found["fp32_param"] = piece.master
        for key, tensor in found.items():
            out.setdefault(key, {})[piece.name] = tensor
    return out


@torch.no_grad()
def copy_boxes(tensors: Mapping[str, Tensor], loaded: Mapping[str, Sequence[Tensor]]) -> None:
    """Inverse of `sharded_pieces`, once its tensors are filled."""
    for name, tensor in tensors.items():
        flat, place = tensor.detach().view(-1), 0
        for part in loaded[name]:
            flat[place : place + part.numel()].copy_(part.reshape(-1))
            place += part.numel()
