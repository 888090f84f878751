"""IOMM-XL, stage 1: 6 B parameters, single-stream family, images only at 512 px, global batch 4096.

Needs the same files as b_stage1.py. The paper trains it with Muon, which is not there yet: this is AdamW.
"""

from iomm.config import Config
from iomm.presets import xl


def config() -> Config:
    return xl("xl-stage1", images=("data/images/*.tar",))
