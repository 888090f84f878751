"""Small random models saved in the real layouts, so that tests load them the way a run does."""

import json
from pathlib import Path

import torch

from iomm.conditioning.random_mllm import save_letter_tokenizer, save_random_internvl

ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
QWEN_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 200,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": ROPE,
}
QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
}
QWEN_IDS = {
    "image_token_id": 199,
    "video_token_id": 198,
    "vision_start_token_id": 197,
    "vision_end_token_id": 196,
    "tie_word_embeddings": True,
}


def save_internvl(folder: Path) -> Path:
    """4 visual tokens of 32 channels, images of 16 px."""
    return save_random_internvl(folder, width=32, layers=2, image_tokens=4, image_px=16)


def _save_qwen(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_letter_tokenizer(folder)
    preprocessing = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 64,
        "max_pixels": 24 * 24,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def save_qwen2_5_vl(folder: Path) -> Path:
    """9 visual tokens of 32 channels, images of 24 px."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {**QWEN_VISION, "depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=dict(QWEN_TEXT), vision_config=vision, **QWEN_IDS)
    return _save_qwen(Qwen2_5_VLForConditionalGeneration(config), folder)


def save_qwen3_vl(folder: Path) -> Path:
    """9 visual tokens of 32 channels and two deepstack features, images of 24 px."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {**QWEN_VISION, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(text_config={**QWEN_TEXT, "head_dim": 16}, vision_config=vision, **QWEN_IDS)
    return _save_qwen(Qwen3VLForConditionalGeneration(config), folder)


MLLMS = {"internvl": save_internvl, "qwen2_5_vl": save_qwen2_5_vl, "qwen3_vl": save_qwen3_vl}


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


def save_flux2_vae(folder: Path) -> Path:
    """A random FLUX.2-layout autoencoder: 8x down, 4 channels, running statistics of 16 numbers a token."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    vae.save_pretrained(folder)
    return folder


def save_dc_ae(folder: Path) -> Path:
    """A random DC-AE: 8x down, 8 channels."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        scaling_factor=0.4,
    ).save_pretrained(folder)
    return folder
