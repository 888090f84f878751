"""Recipe pair+pair: pre-trained on text-image pairs, then fine-tuned on text-image pairs."""

from pathlib import Path

from iomm.config import Config
from iomm.presets import recipe


def config() -> Config:
    return recipe("pair", "pair", Path(__file__).parents[3])
