"""Which source the i-th sample of a run comes from, and which of that source's samples it is.

Of the first i samples, floor(i * mix_ratio) are unlabeled images and the others text-image pairs. That is a
pure function of i: there is no state to save, and any stretch of samples has the right shares to within one
sample.
"""

import functools
from fractions import Fraction
from typing import Literal

Kind = Literal["image", "pair"]


def draw(index: int, mix_ratio: float | Fraction) -> tuple[Kind, int]:
    """The source of global sample `index` and its position in that source's endless order.

    Args:
        index: global sample index, counted from 0 over the whole run (with buckets: over those of a bucket).
        mix_ratio: share of unlabeled images, in [0, 1]; 1 = images only, 0 = pairs only.

    Raises:
        ValueError: a negative index, or a ratio outside [0, 1].
    """
    if index < 0:
        raise ValueError(f"sample index {index} is negative. The first sample of a run has index 0.")
    share = exact_ratio(mix_ratio)
    before = index * share.numerator // share.denominator
    after = (index + 1) * share.numerator // share.denominator
    return ("image", before) if after > before else ("pair", index - before)


@functools.lru_cache(maxsize=128)
def exact_ratio(mix_ratio: float | Fraction) -> Fraction:
    """A ratio as the decimal that it is printed as, so that 0.1 means one in ten exactly.

    Raises:
        ValueError: a ratio outside [0, 1].
    """
    if not 0 <= mix_ratio <= 1:
        raise ValueError(f"mix ratio {mix_ratio} must lie in [0, 1]: 1 = images only, 0 = pairs only.")
    return mix_ratio if isinstance(mix_ratio, Fraction) else Fraction(repr(float(mix_ratio)))
