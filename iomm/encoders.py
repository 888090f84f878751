"""The frozen encoders, autoencoder and MLLM: never trained, never in a checkpoint.

B samples, L latent tokens of C numbers, N patch tokens of F numbers (deepstack features included).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from iomm.autoencoder import open_codec
from iomm.conditioning.mllm import open_mllm
from iomm.conditioning.prompts import PrefixBuilder
from iomm.config import Config
from iomm.data.cache import FeatureCache
from iomm.data.loader import Batch
from iomm.flow.path import Grid
from iomm.parallel.engine import DTYPES
from iomm.random import Stream, normal


@dataclass(frozen=True)
class Shapes:
    """What a rank without encoders has to know of them."""

    grid: Grid  # of an image of data.image_px
    token_px: int  # pixels a side of a latent token
    token_channels: int  # numbers in a latent token
    patch_tokens: int  # of an image, as the MLLM sees it
    mllm_width: int

    @property
    def latent_tokens(self) -> int:
        """Of an image of data.image_px."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Encoded:
    """A batch behind the frozen encoders."""

    batch: Batch
    latent_BLC: Tensor  # clean, normalised
    patches_BNF: Tensor  # the MLLM's patch tokens, before masking
    grid: Grid  # of the latent tokens


class Encoders:
    """The frozen parts. With `data.cache_dir`, latents and patch tokens are kept by content hash."""

    def __init__(self, config: Config, device: torch.device) -> None:
        dtype = DTYPES[config.train.precision]
        # The autoencoder stays in fp32 (fp64): in bf16 its latents lose detail. That is dear (`iomm plan`
        # says how much); `data.cache_dir` pays it once an image.
        self.codec = open_codec(config.codec, torch.promote_types(dtype, torch.float32), device)
        self.mllm = open_mllm(config.mllm, dtype, device)
        self.prefixes = PrefixBuilder(self.mllm, config.condition, config.kernels)
        self.grid = self.codec.grid(config.data.image_px, config.data.image_px)
        if self.codec.token_channels != config.generator.token_channels:
            raise ValueError(
                f"the autoencoder at {config.codec.path} has {self.codec.token_channels} numbers in a token, "
                f"generator.token_channels is {config.generator.token_channels}. Make them equal."
            )
        self.cache: FeatureCache | None = None
        if config.data.cache_dir is not None:
            parts = f"{self.codec.identity()} {self.mllm.vision_identity()} {config.data.image_px}"
            self.cache = FeatureCache(
                Path(config.data.cache_dir), hashlib.sha256(parts.encode()).hexdigest()[:16]
            )

    @property
    def shapes(self) -> Shapes:
        codec, mllm = self.codec, self.mllm
        return Shapes(self.grid, codec.token_px, codec.token_channels, mllm.image_tokens, mllm.width)

    def encode(self, batch: Batch) -> Encoded:
        """Latents and patch tokens of a batch.

        Raises:
            ValueError: a caption that is too long or empty; the message names the sample.
        """
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            try:
                _ = caption is None or self.mllm.tokenize(caption)
            except ValueError as error:
                raise ValueError(f"sample {key}: {error}") from error
        grid = self.codec.grid(*batch.size_px)
        if self.cache is None:
            latent_BLC, patches_BNF = self.codec.encode(batch.image_BCHW), self.mllm.vision(batch.image_BCHW)
            return Encoded(batch, latent_BLC, patches_BNF, grid)
        for content_hash in self.cache.missing(batch.hashes):
            # One by one, so that a kept value does not depend on which images happened to share its batch.
            image_1CHW = batch.image_BCHW[batch.hashes.index(content_hash), None]
            latent, patches = self.codec.encode(image_1CHW)[0], self.mllm.vision(image_1CHW)[0]
            self.cache.put({content_hash: {"latent": latent.cpu(), "patches": patches.cpu()}})
        kept = self.cache.get(batch.hashes)
        device = self.codec.device
        return Encoded(batch, kept["latent"].to(device), kept["patches"].to(device), grid)

    def noise(self, seed: int, stream: Stream, index_B: Tensor, grid: Grid | None = None) -> Tensor:
        """Standard normal (B, L, C) of these sample indices; `grid` None: that of data.image_px."""
        rows, columns = grid or self.grid
        length, channels = rows * columns, self.codec.token_channels
        flat = normal(seed, stream, index_B.to(self.codec.device), length * channels)
        return flat.view(-1, length, channels).to(self.codec.dtype)
