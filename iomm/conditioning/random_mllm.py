"""A random InternVL in the real layout, for benchmarks and tests: the code path is the one that a download
takes."""

import json
from pathlib import Path

import torch


def save_random_internvl(
    folder: Path, *, width: int, layers: int, image_tokens: int, image_px: int = 64
) -> Path:
    """Save an `InternVLForConditionalGeneration` with random weights and a letter-by-letter tokenizer.

    Args:
        width: channels of the LM; a multiple of 32.
        image_tokens: visual tokens after pixel shuffle; a square that divides (image_px / 2)^2.
    Raises:
        ValueError: `image_tokens` does not tile the image.
    """
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    side = round(image_tokens**0.5)
    if side * side != image_tokens or image_px % (2 * side):
        raise ValueError(
            f"{image_tokens} visual tokens do not tile an image of {image_px} px. Give a square number."
        )
    torch.manual_seed(0)
    head = 64 if width % 64 == 0 else 16
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[image_px, image_px],
        patch_size=[image_px // (2 * side)] * 2,
        use_absolute_position_embeddings=True,
    )
    text = Qwen2Config(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=max(1, width // head // 2),
        vocab_size=200,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=199, downsample_ratio=0.5)
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    save_letter_tokenizer(folder)
    preprocessing = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": image_px, "width": image_px},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def save_letter_tokenizer(folder: Path) -> None:
    """Save a tokenizer of printable ASCII, one letter a token, ids below 127."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<unk>": 1, **{chr(c): c for c in range(33, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
