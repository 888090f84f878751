"""Recipe image+image: pre-trained on unlabeled images, then fine-tuned on unlabeled images."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("image", "image", Path(__file__).parents[3])
