"""What modulate and the operators built around it share: affine-free norms of rows, tiles, input checks.

B samples, L tokens, D channels. In the kernels W is D rounded up to a power of two, R the rows (tokens) of a
tile; channels from D on hold zeros.
"""

import torch
from torch import Tensor

from iomm_kernels.launch import jit, next_power_of_2, tl
from iomm_kernels.record import draw

NORMS = ("layer", "rms")


@jit
def row_statistics(x_RW, inside_W, D: tl.constexpr, eps, RMS: tl.constexpr):
    """n(x) (R, W) and rstd (R, 1) of fp32 rows whose channels from D on are zero."""
    if not RMS:
        x_RW = tl.where(inside_W[None, :], x_RW - (tl.sum(x_RW, axis=1) / D)[:, None], 0.0)
    rstd_R1 = (1.0 / tl.sqrt(tl.sum(x_RW * x_RW, axis=1) / D + eps))[:, None]
    return x_RW * rstd_R1, rstd_R1


@jit
def input_gradient(g_RW, n_RW, rstd_R1, D: tl.constexpr, RMS: tl.constexpr):
    """Gradient of n(x)'s input (R, W) from that of n(x), which is zero from channel D on."""
    inner_R1 = (tl.sum(g_RW * n_RW, axis=1) / D)[:, None]
    if RMS:
        return rstd_R1 * (g_RW - n_RW * inner_R1)
    return rstd_R1 * (g_RW - (tl.sum(g_RW, axis=1) / D)[:, None] - n_RW * inner_R1)


def tile(D: int, numbers: int) -> tuple[int, int, int]:
    """(W, R, warps) of a tile of about this many numbers a thread."""
    W = next_power_of_2(D)
    warps = max(1, min(16, W // 256))
    return W, max(1, numbers * 32 * warps // W), warps


def check_inputs(name: str, x_LBD: Tensor, norm: str = "layer", **vectors: Tensor | None) -> None:
    """Raises ValueError where shapes, dtypes or the norm do not fit together."""
    if norm not in NORMS:
        raise ValueError(f"{name}: norm {norm!r} is none of {', '.join(NORMS)}.")
    if x_LBD.ndim != 3:
        raise ValueError(f"{name}: x has shape {tuple(x_LBD.shape)}; expected (L, B, D).")
    for what, vector in vectors.items():
        if vector is not None and vector.shape != x_LBD.shape[1:]:
            raise ValueError(
                f"{name}: {what} has shape {tuple(vector.shape)}; x {tuple(x_LBD.shape)} needs (B, D) = "
                f"{tuple(x_LBD.shape[1:])}."
            )
        if vector is not None and vector.dtype != x_LBD.dtype:
            raise ValueError(
                f"{name}: {what} is {vector.dtype} and x {x_LBD.dtype}. Cast one to the other's dtype."
            )


def vectors(
    seed: int, B: int, D: int, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """n modulation vectors (B, D) as the model has them: chunks of one linear's output."""
    return draw(seed, B, n * D, dtype=dtype, device=device).chunk(n, dim=-1)
