"""Small random models saved in the real layouts, so that tests load them the way a run does."""

from pathlib import Path

import torch

from iomm.conditioning.random_mllm import save_random_internvl


def save_internvl(folder: Path) -> Path:
    """4 visual tokens of 32 channels, images of 16 px."""
    return save_random_internvl(folder, width=32, layers=2, image_tokens=4, image_px=16)


def save_vae(folder: Path) -> Path:
    """A random FLUX-layout autoencoder: 8x down, 16 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=16,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).save_pretrained(folder)
    return folder
