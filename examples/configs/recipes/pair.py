"""First stage of three recipes: pre-training on text-image pairs."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("pair", None, Path(__file__).parents[3])
