"""The layers of Megatron-Core and torch themselves: on any device, in fp32, bf16 or fp64.

`iomm.parallel.backend` says what the layers compute and how they fit together; `iomm.parallel.te` has the
same ones from Transformer Engine. A linear whose FP8 is emulated (`use_fp8`) multiplies plainly between
Megatron's collectives; all others go Megatron's way, or torch's own where a rank computes the whole layer.
"""

from typing import Any, cast, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import Fp8Config
from iomm.parallel import cpu
from iomm.parallel.fp8_emulation import Emulation, Operand, emulation
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron: its base classes are bound at import time

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def _is_whole(layer: ColumnParallelLinear | RowParallelLinear, size: int, size_per_rank: int) -> bool:
    """Whether torch's own linear computes this layer: the same sum, without a Python autograd function around
    it."""
    return size == size_per_rank and not layer.gradient_accumulation_fusion and _fp8(layer) is None


def _tp_group(layer: ColumnParallelLinear | RowParallelLinear) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, layer.tp_group)


def _fp8(layer: nn.Module) -> Emulation | None:
    return cast(Emulation | None, layer._modules.get("fp8"))


@final
class Column(ColumnParallelLinear):
    """x (..., in) -> (..., out/tp). The input is the same on all tensor-parallel ranks, or with sequence
    parallelism the rank's slice along the first axis: (L/tp, B, in) -> (L, B, out/tp)."""

    get_extra_state = nn.Module.get_extra_state  # no empty `_extra_state` entries in state dicts

    def use_fp8(self, settings: Fp8Config) -> None:
        """A rank holds a part of the weight and of the output's gradient."""
        self.fp8 = emulation(settings, frozenset({Operand.WEIGHT, Operand.GRADIENT}), _tp_group(self))

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        fp8 = _fp8(self)
        if fp8 is None:
            return super()._forward_impl(input, weight, bias=bias, **kwargs)
        gather = gather_from_sequence_parallel_region
        enter = gather if self.sequence_parallel else copy_to_tensor_model_parallel_region
        product = fp8(enter(input, group=self.tp_group), weight)
        return product if bias is None else product + bias

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if _is_whole(self, self.output_size, self.output_size_per_partition):
            return F.linear(x, self.weight, self.bias)  # pyright: ignore[reportArgumentType]
        return super().forward(x)[0]


@final
class Row(RowParallelLinear):
    """x (..., in/tp) -> (..., out). The output is the same on all tensor-parallel ranks, or with sequence
    parallelism the rank's slice along the first axis: (L, B, in/tp) -> (L/tp, B, out)."""

    get_extra_state = nn.Module.get_extra_state

    def use_fp8(self, settings: Fp8Config) -> None:
        """A rank holds a part of the weight and of the input."""
        self.fp8 = emulation(settings, frozenset({Operand.WEIGHT, Operand.INPUT}), _tp_group(self))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fp8 = _fp8(self)
        out = super()._forward_impl(input, weight, *args, **kwargs) if fp8 is None else fp8(input, weight)
        # Megatron reduces the product in place. Selective recomputation keeps the product, as it was.
        granularity = cast(TransformerConfig, self.config).recompute_granularity
        return out.clone() if granularity == "selective" and not self.sequence_parallel else out

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if _is_whole(self, self.input_size, self.input_size_per_partition):
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)[0]


@final
class Replicated(nn.Linear):
    """x (..., in) -> (..., out), in full on every tensor-parallel rank."""

    def __init__(
        self, in_size: int, out_size: int, *, bias: bool, config: TransformerConfig, mesh: Mesh
    ) -> None:
        super().__init__(in_size, out_size, bias=bias, dtype=config.params_dtype)
        self._tokens_are_split = config.sequence_parallel
        self._tp_group = mesh.groups.tp

    def use_fp8(self, settings: Fp8Config) -> None:
        """With sequence parallelism a rank holds a part of the tokens."""
        tokens = {Operand.INPUT, Operand.GRADIENT} if self._tokens_are_split else ()
        self.fp8 = emulation(settings, frozenset(tokens), self._tp_group)

    def forward(self, input: Tensor) -> Tensor:
        fp8 = _fp8(self)
        if fp8 is None:
            return super().forward(input)
        product = fp8(input, self.weight)
        return product if self.bias is None else product + self.bias  # pyright: ignore[reportUnnecessaryComparison]


@final
class HeadNorm(nn.Module):
    """The weight of an RMSNorm over the channels of a head, K numbers for all heads; calling gives it.

    Each rank sees its own heads only, so the weight's gradient is summed over the tensor-parallel ranks: here
    or, with sequence parallelism, once a step together with all other parts of gradients.
    """

    def __init__(self, head_size: int, *, config: TransformerConfig, mesh: Mesh) -> None:
        super().__init__()
        self.tp_group = mesh.groups.tp if mesh.tp_size > 1 and not config.sequence_parallel else None
        self.weight = nn.Parameter(torch.empty(head_size, dtype=config.params_dtype))

    def forward(self) -> Tensor:
        if self.tp_group is None:
            return self.weight
        return copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
