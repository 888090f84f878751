"""The training loss: mean squared error of the velocity in fp32 or better (paper eq. 2)."""

from torch import Tensor

from iomm_kernels.velocity_mse import reference


def velocity_loss(velocity_BLC: Tensor, target_BLC: Tensor) -> Tensor:
    """Per-sample mean over tokens and channels, (B,), accumulated in fp32 (fp64 stays fp64)."""
    if velocity_BLC.shape != target_BLC.shape:
        raise ValueError(
            f"velocity {tuple(velocity_BLC.shape)} and target {tuple(target_BLC.shape)} differ in shape."
        )
    return reference(velocity_BLC, target_BLC)
