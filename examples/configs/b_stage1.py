"""IOMM-B, stage 1: 1.6 B parameters, images only at 512 px, global batch 1024.

Needs GPUs; weights/flux/vae (the vae/ folder of FLUX.1) and InternVL3-2B-hf, from the hub or `--set
mllm.path=FOLDER`; and WebDataset shards: `--set 'data.images=["/data/shards/*.tar"]'`.
"""

from iomm.config import Config
from iomm.presets import b


def config() -> Config:
    return b("b-stage1", images=("data/images/*.tar",))
