"""Three-axis rotary position embedding (FLUX; RoFormer, arXiv 2104.09864).

A head's channels are split among (frame, row, column). Neighbouring channels form a pair that is turned by
the angle position / theta^(2 i / axis size); `iomm_kernels.qk_norm_rope` turns them. L tokens, K channels of
a head, B samples.
"""

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos_LP, sin_LP with P = K / 2 pairs; (L, B, P) where samples differ


def rope(
    positions_L3: Tensor, axes: tuple[int, int, int], theta: float, dtype: torch.dtype = torch.float32
) -> Rope:
    """cos and sin of every angle, computed in fp64 and stored in fp32 (fp64 for fp64 models).

    Args:
        positions_L3: the same for all samples, or (L, B, 3).
    """
    angles = []
    for axis, size in enumerate(axes):
        frequency_P = theta ** (
            -torch.arange(0, size, 2, dtype=torch.float64, device=positions_L3.device) / size
        )
        angles.append(positions_L3[..., axis, None].to(torch.float64) * frequency_P)
    angle_LP = torch.cat(angles, dim=-1)
    store = torch.promote_types(dtype, torch.float32)
    return angle_LP.cos().to(store), angle_LP.sin().to(store)
