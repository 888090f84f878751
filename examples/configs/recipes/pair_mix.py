"""Recipe pair+mix: pre-trained on text-image pairs, then fine-tuned on images and pairs, half and half."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("pair", "mix", Path(__file__).parents[3])
