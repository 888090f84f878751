"""The frozen encoders' real classes in the planner's sizes, with random weights or on the meta device."""

from typing import Any

from iomm.plan.shapes import CodecShape, LmShape, VitShape


def text_config(shape: LmShape) -> dict[str, Any]:
    """Of a Qwen2."""
    return {
        "model_type": "qwen2",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
    }


def lm_of(shape: LmShape) -> Any:
    """The LM without its head, frozen."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

    return Qwen2Model(Qwen2Config(**text_config(shape))).requires_grad_(False)


def vision_config(shape: VitShape) -> dict[str, Any]:
    """Of an InternVL's ViT."""
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 16,
        "image_size": [shape.image_px] * 2,
        "patch_size": [shape.patch_px] * 2,
        "use_absolute_position_embeddings": True,
        "attention_bias": shape.qkv_bias,
        "norm_type": "layer_norm",
    }


def codec_of(shape: CodecShape, norm_groups: int = 32) -> Any:
    """The autoencoder, frozen."""
    from diffusers import AutoencoderKL

    levels = len(shape.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=shape.channels,
        layers_per_block=shape.resnets,
        latent_channels=shape.latent_channels,
        norm_num_groups=norm_groups,
        use_quant_conv=shape.quant,
        use_post_quant_conv=shape.quant,
    ).requires_grad_(False)
