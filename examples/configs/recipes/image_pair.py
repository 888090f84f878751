"""Recipe image+pair: pre-trained on unlabeled images, then fine-tuned on text-image pairs."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("image", "pair", Path(__file__).parents[3])
