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
    groups: Sequence[np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The mean of the groups' means, with its bootstrap interval.

    Args:
        groups: the scores of each group's prompts, (P,) each, at least one. A prompt with several images is
            one number, their mean: its images are not independent.
        seed: of the draws; the same seed gives the same interval.
        level: share of the resampled scores that the interval holds.
    Raises:
        ValueError: no group, or an empty one.
    """
    if not groups or any(len(group) == 0 for group in groups):
        sizes = [len(group) for group in groups]
        raise ValueError(f"groups of {sizes} prompts have no mean. Give at least one prompt in every group.")
    rng = np.random.Generator(np.random.Philox(seed))
    drawn_R = np.zeros(resamples)
    for group in groups:
        drawn_R += group[rng.integers(len(group), size=(resamples, len(group)))].mean(axis=1)
    low, high = np.quantile(drawn_R / len(groups), [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([group.mean() for group in groups]))
    return Interval(mean=mean, low=float(low), high=float(high))
