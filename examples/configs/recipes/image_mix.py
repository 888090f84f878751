"""Recipe image+mix: pre-trained on unlabeled images, then fine-tuned on images and pairs, half and half."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("image", "mix", Path(__file__).parents[3])
