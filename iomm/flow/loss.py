"""The training loss: mean squared error of the velocity in fp32 or better (paper eq. 2)."""

import torch
from torch import Tensor


def velocity_loss(velocity_BLC: Tensor, target_BLC: Tensor) -> Tensor:
    """Per-sample mean over tokens and channels, (B,), accumulated in fp32 (fp64 stays fp64)."""
    if velocity_BLC.shape != target_BLC.shape:
        raise ValueError(
            f"velocity {tuple(velocity_BLC.shape)} and target {tuple(target_BLC.shape)} differ in shape."
        )
    dtype = torch.promote_types(velocity_BLC.dtype, torch.float32)
    return (velocity_BLC.to(dtype) - target_BLC.to(dtype)).square().flatten(1).mean(1)
