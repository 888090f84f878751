"""Operators of other libraries that compute the same as ours, for the benchmark, where they are installed.

Transformer Engine's and Liger's norms carry weights and know no modulation: theirs is the norm, with weights
of one, and PyTorch does the rest. Neither runs without a GPU: not yet run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _te_modulate() -> Callable[..., Any]:
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    norms: dict[tuple[int, str, torch.dtype], Any] = {}

    def run(
        x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, norm: str = "layer", eps: float = 1e-6
    ) -> Tensor:
        key = x_LBD.shape[-1], norm, x_LBD.dtype
        if key not in norms:
            kind = te.LayerNorm if norm == "layer" else te.RMSNorm
            norms[key] = kind(x_LBD.shape[-1], eps=eps, device=x_LBD.device, dtype=x_LBD.dtype)
        y_LBD = norms[key](x_LBD) * (1 + scale_BD)
        return y_LBD if shift_BD is None else y_LBD + shift_BD

    return run


def _liger_modulate() -> Callable[..., Any]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    def run(
        x_LBD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, norm: str = "layer", eps: float = 1e-6
    ) -> Tensor:
        one_D = torch.ones_like(scale_BD[0])
        if norm == "layer":
            y_LBD = LigerLayerNormFunction.apply(x_LBD, one_D, torch.zeros_like(one_D), eps)
        else:
            y_LBD = LigerRMSNormFunction.apply(x_LBD, one_D, eps)
        y_LBD = y_LBD * (1 + scale_BD)
        return y_LBD if shift_BD is None else y_LBD + shift_BD

    return run


# (operator, library) -> makes the function, raising ImportError where the library is not installed
PEERS: dict[tuple[str, str], Callable[[], Callable[..., Any]]] = {
    ("modulate", "te"): _te_modulate,
    ("modulate", "liger"): _liger_modulate,
}
