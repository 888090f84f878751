"""Which patch tokens a training step shows (method.md section 2)."""

import torch
from torch import Tensor

from iomm.random import Stream, uniform


def keep_tokens(seed: int, index_B: Tensor, tokens: int, mask_ratio: float) -> Tensor:
    """keep_BN: True where the patch token is kept, with probability 1 - mask_ratio each; a function of (seed,
    sample index)."""
    return uniform(seed, Stream.MASK, index_B, tokens) >= mask_ratio


def null_samples(seed: int, index_B: Tensor, probability: float) -> Tensor:
    """null_B: True where the sample trains the null condition."""
    return uniform(seed, Stream.NULL, index_B, 1)[:, 0] < probability


def pack_attended(attend_BP: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Move each row's attended positions to the front, in order, and cut to the longest row.

    This is mask mode `drop` without a varlen kernel: rows are padded to the longest one, so it saves what the
    longest row allows, and it reads one number back from the device.

    Args:
        attend_BP: True where a position counts.
        tensors: (B, P, ...) tensors to pack alike.
    Returns:
        the packed attend_BP', then the packed tensors; P' = the longest row.
    """
    length = int(attend_BP.sum(1).max())
    order_BP = torch.argsort(attend_BP.logical_not().to(torch.int8), dim=1, stable=True)[:, :length]
    packed = [attend_BP.gather(1, order_BP)]
    for tensor in tensors:
        index = order_BP.view(*order_BP.shape, *(1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
        packed.append(tensor.gather(1, index))
    return tuple(packed)
