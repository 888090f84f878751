"""Sizes of the frozen encoders: of the published ones by name, of any other from its folder's config.json.

Only sizes are read, never weights, so a plan needs no download.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iomm.config import CodecConfig, MllmConfig


@dataclass(frozen=True, kw_only=True)
class LmShape:
    """A decoder with grouped queries and a gated MLP (Qwen2, Llama)."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int  # inner channels of the gated MLP
    vocabulary: int
    tied: bool  # whether the output head is the embedding
    qkv_bias: bool = True

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    @property
    def layer_weights(self) -> int:
        """Of the matrices of one layer."""
        return 2 * self.width * (self.width + self.kv_width) + 3 * self.width * self.mlp

    @property
    def weights(self) -> int:
        """All of them: layers, norms, embedding, and the head if it is not tied."""
        bias = self.width + 2 * self.kv_width if self.qkv_bias else 0
        blocks = self.layers * (self.layer_weights + bias + 2 * self.width)
        return blocks + self.width + (1 if self.tied else 2) * self.vocabulary * self.width


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """InternVL's eye: ViT with a class token, pixel shuffle, and a projector of two linears."""

    width: int
    layers: int
    mlp: int
    image_px: int
    patch_px: int
    shuffle: int  # patches a side that become one token
    qkv_bias: bool = True

    @property
    def patches(self) -> int:
        return (self.image_px // self.patch_px) ** 2

    @property
    def tokens(self) -> int:
        """Patch tokens that the LM sees."""
        return self.patches // self.shuffle**2

    def weights(self, lm_width: int) -> int:
        """Of ViT and projector, positions included."""
        d, packed = self.width, self.width * self.shuffle**2
        bias = 3 * d if self.qkv_bias else 0
        layer = (
            4 * d * d + bias + d + 2 * d * self.mlp + self.mlp + d + 4 * d + 2 * d
        )  # + norms, layer scales
        ends = 3 * self.patch_px**2 * d + d + d + (self.patches + 1) * d
        projector = 2 * packed + (packed + 1) * lm_width + (lm_width + 1) * lm_width
        return self.layers * layer + ends + projector


@dataclass(frozen=True, kw_only=True)
class MllmShape:
    """A frozen multimodal LLM of InternVL's kind."""

    name: str
    lm: LmShape
    vit: VitShape

    @property
    def weights(self) -> int:
        return self.lm.weights + self.vit.weights(self.lm.width)


@dataclass(frozen=True, kw_only=True)
class CodecShape:
    """`AutoencoderKL`. Training needs the encoder; the decoder is held too, for samples."""

    name: str
    channels: tuple[int, ...]  # of each level, the finest first
    resnets: int  # a level, in the encoder
    latent_channels: int
    mid_attention: bool = True
    quant: bool = False  # 1 x 1 convolutions around the latent

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channels) - 1)


INTERNVL3_2B = MllmShape(
    name="OpenGVLab/InternVL3-2B-hf",
    lm=LmShape(width=1536, layers=28, heads=12, kv_heads=2, mlp=8960, vocabulary=151_674, tied=False),
    vit=VitShape(width=1024, layers=24, mlp=4096, image_px=448, patch_px=14, shuffle=2),
)
FLUX_VAE = CodecShape(name="FLUX.1 vae", channels=(128, 256, 512, 512), resnets=2, latent_channels=16)
MLLMS = {INTERNVL3_2B.name: INTERNVL3_2B}
# Where the presets expect the autoencoder, and the hub's names.
CODECS = {name: FLUX_VAE for name in ("weights/flux/vae", "black-forest-labs/FLUX.1-schnell", "flux")}


def mllm_shape(config: MllmConfig) -> MllmShape:
    """Sizes of the MLLM at `config.path`.

    Raises:
        ValueError: neither a published one nor a folder with a config.json of an InternVL.
    """
    if config.path in MLLMS and not Path(config.path).is_dir():
        return MLLMS[config.path]
    data = _read(config.path, "mllm.path", MLLMS)
    if data.get("model_type") != "internvl":
        raise ValueError(
            f"the MLLM at {config.path} is a {data.get('model_type')!r}; the planner counts InternVL "
            f"(ViT, pixel shuffle, Qwen2 LM). Plan with --set mllm.path={INTERNVL3_2B.name}."
        )
    text, vision = data["text_config"], data["vision_config"]
    lm = LmShape(
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        mlp=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tied=data.get("tie_word_embeddings", text.get("tie_word_embeddings", True)),
    )
    vit = VitShape(
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        mlp=vision["intermediate_size"],
        image_px=vision["image_size"][0],
        patch_px=vision["patch_size"][0],
        shuffle=round(1 / data["downsample_ratio"]),
        qkv_bias=vision.get("attention_bias", False),
    )
    return MllmShape(name=config.path, lm=lm, vit=vit)


def codec_shape(config: CodecConfig) -> CodecShape:
    """Sizes of the autoencoder at `config.path`.

    Raises:
        ValueError: neither a published one nor a folder with a config.json of an `AutoencoderKL`.
    """
    if config.path in CODECS and not Path(config.path).is_dir():
        return CODECS[config.path]
    data = _read(config.path, "codec.path", CODECS)
    if data.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"the autoencoder at {config.path} is a {data.get('_class_name')}; the planner counts "
            "AutoencoderKL. Plan with --set codec.path=flux."
        )
    return CodecShape(
        name=config.path,
        channels=tuple(data["block_out_channels"]),
        resnets=data["layers_per_block"],
        latent_channels=data["latent_channels"],
        mid_attention=data["mid_block_add_attention"],
        quant=data["use_quant_conv"],
    )


def _read(path: str, setting: str, published: Mapping[str, object]) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{setting} {path} has no config.json to read sizes from, and is none of the published ones the "
            f"planner knows ({', '.join(published)}). Set it to one of them or to a folder."
        )
    return json.loads(file.read_text())


def latent_tokens(shape: CodecShape, image_px: int, patch: int) -> int:
    """Latent tokens of a square image.

    Raises:
        ValueError: the side is no multiple of a token's.
    """
    token_px = shape.downsampling * patch
    if image_px % token_px:
        raise ValueError(
            f"an image of {image_px} px is not a multiple of the {token_px} px of one latent token. Choose "
            f"--px {math.ceil(image_px / token_px) * token_px}."
        )
    return (image_px // token_px) ** 2
