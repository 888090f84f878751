"""The layers a model is built from, whoever's they are: `local` is Megatron-Core's, on any device, in fp32,
bf16 or fp64.

    column: y_out/tp = x_in W[out/tp, in]^T + b[out/tp]             every rank holds a slice of the output
        channels
    row:    y_out    = sum over ranks of x_in/tp W[out, in/tp]^T + b   every rank holds a slice of the input
        channels

A block is column -> (attention over its own heads | activation) -> row: two all-reduces a block, one in each
direction. Weights come uninitialised: the model initialises them by name, so that the layout has no influence
on them.
"""

import functools
import logging
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import ParallelConfig
from iomm.parallel import cpu
from iomm.parallel.mesh import Mesh

cpu.prepare()  # before the first import of Megatron: its base classes are bound at import time

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def transformer_config(
    hidden_size: int, heads: int, dtype: torch.dtype, mesh: Mesh, parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron's settings for a model of this width; `dtype` is that of the parameters and of the
    computation.

    Raises:
        ValueError: the backend is missing, or the heads do not divide over the tensor-parallel ranks.
    """
    _check_backend(parallel.backend)
    if heads % mesh.tp_size:
        raise ValueError(
            f"generator.heads {heads} is not divisible by parallel.tp {mesh.tp_size}: a rank holds "
            "whole heads. Lower parallel.tp or change the heads."
        )
    return TransformerConfig(
        num_layers=1,  # read by Megatron's own transformer blocks only, of which there are none
        hidden_size=hidden_size,
        num_attention_heads=heads,
        tensor_model_parallel_size=mesh.tp_size,
        perform_initialization=False,
        use_cpu_initialization=True,  # parameters appear on torch's default device, which may be "meta"
        gradient_accumulation_fusion=False,  # needs apex's CUDA extension
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        cuda_graph_modules=[],  # the default warns about its own deprecation
    )


@functools.cache
def _check_backend(backend: str) -> None:
    if backend == "auto":
        logging.getLogger(__name__).info("parallel.backend auto: local, the only layers available yet")
    if backend == "te":
        raise ValueError(
            "parallel.backend = te, but the Transformer Engine layers are not available yet. "
            "Set parallel.backend=local (or auto, which is local today)."
        )


def _is_whole(layer: ColumnParallelLinear | RowParallelLinear, size: int, size_per_rank: int) -> bool:
    """Whether torch's own linear computes this layer: the same sum, without a Python autograd function around
    it."""
    return size == size_per_rank and not layer.gradient_accumulation_fusion


@final
class Column(ColumnParallelLinear):
    """x (..., in) -> (..., out/tp). The input is the same on all tensor-parallel ranks."""

    get_extra_state = nn.Module.get_extra_state  # no empty `_extra_state` entries in state dicts

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if _is_whole(self, self.output_size, self.output_size_per_partition):
            return F.linear(x, self.weight, self.bias)  # pyright: ignore[reportArgumentType]
        return super().forward(x)[0]


@final
class Row(RowParallelLinear):
    """x (..., in/tp) -> (..., out). The output is the same on all tensor-parallel ranks."""

    get_extra_state = nn.Module.get_extra_state

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if _is_whole(self, self.input_size, self.input_size_per_partition):
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)[0]


@final
class HeadNorm(nn.Module):
    """RMSNorm over the channels of a head, x (..., H/tp heads, K) -> same; one weight of K for all heads.

    Each rank sees its own heads only, so the weight's gradient is summed over the tensor-parallel ranks.
    """

    def __init__(self, head_size: int, *, eps: float, config: TransformerConfig, mesh: Mesh) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = mesh.groups.tp if mesh.tp_size > 1 else None
        self.weight = nn.Parameter(torch.empty(head_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.tp_group is not None:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return F.rms_norm(x, weight.shape, weight, self.eps)


@final
class Layers:
    """Makes the layers of one model. All of them are uninitialised and take `config.params_dtype`."""

    def __init__(self, config: TransformerConfig, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh

    def column(self, in_size: int, out_size: int, *, bias: bool = True) -> Column:
        """Linear of which a rank computes out_size/tp output channels.

        Raises:
            ValueError: `out_size` does not divide over the tensor-parallel ranks.
        """
        self._check_divides("output", out_size)
        return Column(in_size, out_size, **self._common(bias), gather_output=False)

    def row(self, in_size: int, out_size: int, *, bias: bool = True) -> Row:
        """Linear of which a rank holds in_size/tp input channels; the results are summed over the ranks.

        Raises:
            ValueError: `in_size` does not divide over the tensor-parallel ranks.
        """
        self._check_divides("input", in_size)
        return Row(in_size, out_size, **self._common(bias), input_is_parallel=True)

    def replicated(self, in_size: int, out_size: int, *, bias: bool = True) -> nn.Linear:
        """Linear that every tensor-parallel rank computes in full, on the same input.

        Its gradients are right if its output is used by all ranks alike, e.g. added to a row's output or fed
        to a column: a column sums its input's gradient over the ranks.
        """
        return nn.Linear(in_size, out_size, bias=bias, dtype=self.config.params_dtype)

    def head_norm(self, head_size: int, *, eps: float = 1e-6) -> HeadNorm:
        """RMSNorm over one head's channels, for queries and keys."""
        return HeadNorm(head_size, eps=eps, config=self.config, mesh=self.mesh)

    def heads_per_rank(self, heads: int) -> int:
        """How many of `heads` attention heads a rank holds.

        Raises:
            ValueError: they do not divide.
        """
        self._check_divides("head", heads)
        return heads // self.mesh.tp_size

    def _check_divides(self, what: str, size: int) -> None:
        if size % self.mesh.tp_size:
            raise ValueError(
                f"{what} count {size} of a tensor-parallel layer is not divisible by "
                f"parallel.tp {self.mesh.tp_size}. Lower parallel.tp or change the width."
            )

    def _common(self, bias: bool) -> dict[str, Any]:
        return dict(
            config=self.config,
            init_method=nn.Identity(),  # never called: perform_initialization is False
            bias=bias,
            skip_bias_add=False,
            tp_group=self.mesh.groups.tp,
        )
