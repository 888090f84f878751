"""Stage 2 in miniature: from stage 1's weights, images and captioned images (382 of them), half and half."""

import dataclasses
from pathlib import Path

from iomm.config import Config
from iomm.presets import tiny


def config() -> Config:
    base = tiny("tiny-stage2", Path(__file__).parents[1], steps=700, lr=1e-3, mix_ratio=0.5, seed=1)
    return dataclasses.replace(base, train=dataclasses.replace(base.train, init_from="runs/tiny-stage1"))
