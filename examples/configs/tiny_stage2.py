"""Stage 2 in miniature: from stage 1's weights, three images to one captioned image.

The paper mixes half and half with 210 k pairs. Here are 382: seen more often, they are learned by heart, and
the held-out captions stop helping.
"""

import dataclasses
from pathlib import Path

from iomm.config import Config
from iomm.presets import tiny


def config() -> Config:
    base = tiny("tiny-stage2", Path(__file__).parents[1], steps=400, lr=5e-4, mix_ratio=0.75, seed=1)
    return dataclasses.replace(base, train=dataclasses.replace(base.train, init_from="runs/tiny-stage1"))
