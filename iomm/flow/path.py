"""The straight path between data and noise (paper section 3; METHOD.md section 1).

    x_t = (1 - t) x + t z        z ~ N(0, I), t = 0 is data, t = 1 is noise
    dx_t / dt = z - x            the velocity

Shapes: B samples, L latent tokens, C numbers in a token. `t_B` is fp32 in [0, 1].
"""

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "clean"]
Grid = tuple[int, int]  # rows and columns of an image's latent tokens, L = rows * columns


def _like(t_B: Tensor, x_BLC: Tensor) -> Tensor:
    return t_B.to(x_BLC.dtype).view(-1, *(1,) * (x_BLC.ndim - 1))


def interpolate(x_BLC: Tensor, z_BLC: Tensor, t_B: Tensor) -> Tensor:
    """x_t, in the dtype of `x_BLC`."""
    t_B11 = _like(t_B, x_BLC)
    return (1 - t_B11) * x_BLC + t_B11 * z_BLC


def velocity_target(x_BLC: Tensor, z_BLC: Tensor) -> Tensor:
    """The velocity of the path, which does not depend on t."""
    return z_BLC - x_BLC


def to_velocity(
    output_BLC: Tensor, x_t_BLC: Tensor, t_B: Tensor, predict: Prediction, min_timestep: float
) -> Tensor:
    """The velocity that a network output stands for.

    `predict = "clean"`: the output is an estimate of x and v = (x_t - x) / max(t, min_timestep). The clamp
    bounds the weight that the velocity loss gives to samples near the data, 1 / min_timestep^2.
    """
    if predict == "velocity":
        return output_BLC
    return (x_t_BLC - output_BLC) / _like(t_B, x_t_BLC).clamp_min(min_timestep)


def patchify(latent_BCHW: Tensor, patch: int) -> Tensor:
    """Latent (B, C, H, W) -> tokens (B, H/p * W/p, C * p * p), row by row, channels first inside a token:
    FLUX's packing.

    Raises:
        ValueError: a side is not a multiple of `patch`.
    """
    b, c, h, w = latent_BCHW.shape
    if h % patch or w % patch:
        raise ValueError(
            f"latent {h} x {w} is not a multiple of the patch {patch}. Choose an image side that is."
        )
    x = latent_BCHW.view(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(x_BLC: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """Inverse of `patchify` for a grid of rows x columns tokens."""
    b, length, c = x_BLC.shape
    if length != rows * columns:
        raise ValueError(f"{length} tokens do not fill a grid of {rows} x {columns}.")
    x = x_BLC.view(b, rows, columns, c // patch**2, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c // patch**2, rows * patch, columns * patch)


def grid_positions(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Position ids (L, 3) = (frame 0, row, column) of a token grid, as FLUX numbers them."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    return torch.stack((torch.zeros_like(row), row, column), dim=-1).view(-1, 3)
