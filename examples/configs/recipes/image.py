"""First stage of three recipes: pre-training on unlabeled images."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("image", None, Path(__file__).parents[3])
