"""Small random models saved in the real layouts, so that tests load them the way a run does."""

from pathlib import Path

import torch


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of letters and a few words: any lower-case text has tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<unk>": 1, **{chr(c): c for c in range(33, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def save_internvl(folder: Path, width: int = 32, image_px: int = 16, layers: int = 2, patch_px: int = 4) -> Path:
    """A random InternVL: (image_px / patch_px / 2)^2 visual tokens of `width` channels."""
    import json

    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    torch.manual_seed(0)
    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=[image_px, image_px], patch_size=[patch_px, patch_px], use_absolute_position_embeddings=True,
    )  # fmt: skip
    text = Qwen2Config(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=max(1, width // 16),
        num_key_value_heads=max(1, width // 32), vocab_size=200, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=199, downsample_ratio=0.5)
    config.vision_config.image_size = [image_px, image_px]
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": image_px, "width": image_px}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def save_vae(folder: Path) -> Path:
    """A random FLUX-layout autoencoder: 8x down, 16 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=16, norm_num_groups=4, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.5, shift_factor=0.1,
    ).save_pretrained(folder)  # fmt: skip
    return folder
