"""Stage 1 in miniature: images only, each conditioned on its own masked patch tokens."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import tiny


def config() -> Config:
    return tiny("tiny-stage1", Path(__file__).parents[1], steps=1200)
