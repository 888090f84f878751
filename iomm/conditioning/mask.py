"""Which patch tokens a training step shows (METHOD.md section 2)."""

from torch import Tensor

from iomm.random import Stream, uniform


def keep_tokens(seed: int, index_B: Tensor, tokens: int, mask_ratio: float) -> Tensor:
    """keep_BN: True where the patch token is kept, with probability 1 - mask_ratio each; a function of (seed,
    sample index)."""
    return uniform(seed, Stream.MASK, index_B, tokens) >= mask_ratio


def null_samples(seed: int, index_B: Tensor, probability: float) -> Tensor:
    """null_B: True where the sample trains the null condition."""
    return uniform(seed, Stream.NULL, index_B, 1)[:, 0] < probability
