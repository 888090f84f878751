"""IOMM-B, stage 2: from stage 1's EMA weights, half images, half text-image pairs (210 k in the paper), batch
256."""

import dataclasses

from iomm.config import Config
from iomm.presets import b


def config() -> Config:
    base = b("b-stage2", images=("data/images/*.tar",))
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, pairs=("data/pairs/*.tar",), mix_ratio=0.5),
        train=dataclasses.replace(
            base.train, steps=8_200, global_batch_images=256, init_from="runs/b-stage1"
        ),
    )
