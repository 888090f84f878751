"""Bootstrap intervals of benchmark scores: prompts are drawn again, within their category."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A score with its percentile interval."""

    mean: float
    low: float
    high: float


def interval_of_means(
    groups: Sequence[np.ndarray],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The mean of the groups' means, with its bootstrap interval.

    Args:
        groups: the scores of each group's prompts, (P,) each, at least one. A prompt with several images is
            one number, their mean: its images are not independent.
        weights: of the groups' means, one each; they are divided by their sum. None: all alike.
        seed: of the draws; the same seed gives the same interval.
        level: share of the resampled scores that the interval holds.
    Raises:
        ValueError: no group, an empty one, or not one weight a group.
    """
    if not groups or any(len(group) == 0 for group in groups):
        sizes = [len(group) for group in groups]
        raise ValueError(f"groups of {sizes} prompts have no mean. Give at least one prompt in every group.")
    shares_G = np.ones(len(groups)) if weights is None else np.array(weights, float)
    if len(shares_G) != len(groups) or (shares_G <= 0).any():
        raise ValueError(f"weights {list(shares_G)} for {len(groups)} groups: give one above 0 for each.")
    rng = np.random.Generator(np.random.Philox(seed))
    drawn_R = np.zeros(resamples)
    for group, share in zip(groups, shares_G, strict=True):
        drawn_R += share * group[rng.integers(len(group), size=(resamples, len(group)))].mean(axis=1)
    low, high = np.quantile(drawn_R / shares_G.sum(), [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.average([group.mean() for group in groups], weights=shares_G))
    return Interval(mean=mean, low=float(low), high=float(high))
