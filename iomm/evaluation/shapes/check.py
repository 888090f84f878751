"""How often the detector is right: on true renders, and on what an autoencoder makes of them.

A generator that paints through an autoencoder cannot score higher than the autoencoder's own round trip.
"""

from dataclasses import dataclass

import numpy as np
import torch

from iomm.autoencoder import LatentCodec
from iomm.evaluation.shapes.detector import detect
from iomm.evaluation.shapes.judge import judge
from iomm.evaluation.shapes.prompts import CATEGORIES, Category
from iomm.evaluation.shapes.sampling import Pair, draw_pair
from iomm.evaluation.shapes.scene import render

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of scenes of one category."""

    correct: float  # judged to show what their prompts ask for
    exact: float  # and nothing else
    same: float  # every shape and colour found, and no other


def measure(scenes: int, *, seed: int = 0, codec: LatentCodec | None = None) -> dict[Category, Accuracy]:
    """The detector's accuracy in each category.

    Args:
        scenes: of each category, at least one.
        codec: encodes and decodes the pictures first.
    Raises:
        ValueError: fewer scenes.
    """
    if scenes < 1:
        raise ValueError(f"{scenes} scenes of a category have no accuracy. Ask for at least 1.")
    right: dict[Category, list[tuple[bool, bool, bool]]] = {category: [] for category in CATEGORIES}
    numbers = range(scenes * len(CATEGORIES))
    for first in range(0, len(numbers), _BATCH):
        pairs = [draw_pair(seed, n) for n in numbers[first : first + _BATCH]]
        images_BHW3 = np.stack([render(pair.scene) for pair in pairs])
        if codec is not None:
            tokens = codec.encode(torch.from_numpy(images_BHW3).permute(0, 3, 1, 2))
            images_BHW3 = codec.decode(tokens).permute(0, 2, 3, 1).cpu().numpy()
        for pair, image_HW3 in zip(pairs, images_BHW3, strict=True):
            right[pair.prompt.facts.category].append(_right(pair, image_HW3))
    found: dict[Category, Accuracy] = {}
    for category, of in right.items():
        correct, exact, same = np.mean(of, axis=0).tolist()
        found[category] = Accuracy(correct=correct, exact=exact, same=same)
    return found


def _right(pair: Pair, image_HW3: np.ndarray) -> tuple[bool, bool, bool]:
    verdict = judge(pair.prompt.facts, detect(image_HW3))
    found = sorted((str(one.shape), str(one.colour)) for one in verdict.detection.objects)
    shown = sorted((thing.shape, thing.colour) for thing in pair.scene.things)
    return verdict.correct, verdict.exact, found == shown
