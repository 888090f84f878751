"""Recipe pair+image: pre-trained on text-image pairs, then fine-tuned on unlabeled images."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("pair", "image", Path(__file__).parents[3])
