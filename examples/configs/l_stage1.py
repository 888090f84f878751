"""IOMM-L, stage 1: 2.7 B parameters, images only at 512 px, global batch 512. Needs the same files as
b_stage1.py."""

from iomm.config import Config
from iomm.presets import large


def config() -> Config:
    return large("l-stage1", images=("data/images/*.tar",))
