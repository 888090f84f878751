"""The frozen encoders, autoencoder and MLLM: never trained, never in a checkpoint.

B samples, L latent tokens of C numbers, N patch tokens of F numbers (deepstack features included).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from iomm.autoencoder import Moments, open_codec
from iomm.conditioning.mllm import open_mllm
from iomm.conditioning.prompts import PrefixBuilder
from iomm.config import Config
from iomm.data.cache import FeatureCache, feature_key
from iomm.data.loader import Batch, Sample
from iomm.data.view import View
from iomm.flow.path import Grid
from iomm.parallel.backend import kernel_provider
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
    latent_BLC: Tensor  # clean, normalised: the mean, where the autoencoder gives a distribution
    # The MLLM's patch tokens, before masking; zeros where a caption is the condition, None if it always is.
    patches_BNF: Tensor | None
    grid: Grid  # of the latent tokens
    logvar_BLC: Tensor | None = None  # of the latents, where training draws them (codec.sample)


class Encoders:
    """The frozen parts. With `data.cache_dir`, their outputs are kept by content hash and view."""

    def __init__(self, config: Config, device: torch.device) -> None:
        dtype = DTYPES[config.train.precision]
        # The autoencoder stays in fp32 (fp64): in bf16 its latents lose detail. That is dear (`iomm plan`
        # says how much); `data.cache_dir` pays it once an image.
        self.codec = open_codec(config.codec, torch.promote_types(dtype, torch.float32), device)
        self.mllm = open_mllm(config.mllm, dtype, device)
        self.prefixes = PrefixBuilder(
            self.mllm, config.condition, kernel_provider(config.kernels, device, dtype)
        )
        self.grid = self.codec.grid(config.data.image_px, config.data.image_px)
        if self.codec.token_channels != config.generator.token_channels:
            raise ValueError(
                f"the autoencoder at {config.codec.path} has {self.codec.token_channels} numbers in a token, "
                f"generator.token_channels is {config.generator.token_channels}. Make them equal."
            )
        self._moments = ("mean", "logvar") if config.codec.sample else ("mean",)
        self.caches = self._open_caches(config)

    def _open_caches(self, config: Config) -> dict[str, FeatureCache]:
        """By encoder; a cache lasts as long as its own encoder does not change."""
        data = config.data
        if data.cache_dir is None:
            return {}
        dtype = torch.bfloat16 if data.cache_precision == "bf16" else None
        known = {
            "vae": (self.codec.identity(), self._moments),
            "vit": (self.mllm.vision_identity(), ("patches",)),
        }
        return {
            encoder: FeatureCache(
                Path(data.cache_dir),
                f"{encoder}-{known[encoder][0]}-{data.cache_precision}",
                known[encoder][1],
                dtype=dtype,
            )
            for encoder in data.cache
        }

    @property
    def shapes(self) -> Shapes:
        codec, mllm = self.codec, self.mllm
        return Shapes(self.grid, codec.token_px, codec.token_channels, mllm.image_tokens, mllm.width)

    def encode(self, batch: Batch, *, captioned_too: bool = False) -> Encoded:
        """Latents of a batch, and the patch tokens of its samples without caption.

        Args:
            captioned_too: the patch tokens of all samples.
        Raises:
            ValueError: a caption that is too long or empty; the message names the sample.
        """
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            try:
                _ = caption is None or self.mllm.tokenize(caption)
            except ValueError as error:
                raise ValueError(f"sample {key}: {error}") from error
        moments = self._encode("vae", batch)
        shown = [row for row, text in enumerate(batch.captions) if captioned_too or text is None]
        patches_BNF = self._patches_of(batch, shown) if shown else None
        to = {"device": self.codec.device, "dtype": self.codec.dtype}
        logvar_BLC = moments["logvar"].to(**to) if "logvar" in moments else None
        grid = self.codec.grid(*batch.size_px)
        return Encoded(batch, moments["mean"].to(**to), patches_BNF, grid, logvar_BLC)

    def _patches_of(self, batch: Batch, rows: list[int]) -> Tensor:
        """Patch tokens (B, N, F) of the samples at `rows`; zeros elsewhere."""
        everything = len(rows) == len(batch.keys)
        patches = self._encode("vit", batch if everything else batch.take(rows))["patches"]
        patches = patches.to(self.mllm.device, self.mllm.dtype)
        if everything:
            return patches
        patches_BNF = patches.new_zeros(len(batch.keys), *patches.shape[1:])
        patches_BNF[rows] = patches
        return patches_BNF

    def _encode(self, encoder: str, batch: Batch, at_once: int = 1) -> Mapping[str, Tensor]:
        """The outputs of one encoder, (B, L, C) each, from its cache as far as they are there."""
        outputs = {"vae": self._latents, "vit": self._patches}[encoder]
        if encoder not in self.caches:
            return outputs(batch.image_BCHW)
        keys, image = _keys(batch), batch.image_BCHW
        return self.caches[encoder].get(keys, lambda places: outputs(image[places]), at_once=at_once)

    def _caches_for(self, *, captioned: bool) -> dict[str, FeatureCache]:
        """The caches that training reads for a sample."""
        return {encoder: c for encoder, c in self.caches.items() if encoder != "vit" or not captioned}

    def lacks(self, content_hash: str, view: View, *, captioned: bool) -> bool:
        """Whether a cache has not yet what training needs of what is shown of an image."""
        key = feature_key(content_hash, view.name)
        return any(cache.missing([key]) for cache in self._caches_for(captioned=captioned).values())

    def read_ahead(self, sample: Sample) -> None:
        """Begin to read what the caches have of a sample that will soon be encoded. From any thread."""
        for cache in self._caches_for(captioned=sample.caption is not None).values():
            cache.read_ahead(feature_key(sample.content_hash, sample.view.name))

    def keep(self, batch: Batch) -> int:
        """Encode what the caches lack of a batch, all of it together, and keep it; how many images that were.

        Args:
            batch: with captions, or without.
        Raises:
            OSError: a part could not be written (a full disk).
        """
        most, keys = 0, _keys(batch)
        for encoder, cache in self._caches_for(captioned=batch.captions[0] is not None).items():
            if cache.full:
                cache.flush()
            missing = set(cache.missing(keys))
            rows = [row for row, key in enumerate(keys) if key in missing]
            if rows:
                self._encode(encoder, batch.take(rows), at_once=len(rows))
            most = max(most, len(missing))
        return most

    def _latents(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        moments = self.codec.moments(image_BCHW)
        found = {"mean": moments.mean_BLC, "logvar": moments.logvar_BLC}
        return {name: value for name in self._moments if (value := found[name]) is not None}

    def _patches(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        return {"patches": self.mllm.vision(image_BCHW)}

    def training_latent(self, item: Encoded, seed: int) -> Tensor:
        """Latent tokens (B, L, C) that a training step shows: the mean, or with `codec.sample` a draw that is
        a function of (seed, global sample index)."""
        if item.logvar_BLC is None:
            return item.latent_BLC
        z_BLC = self.noise(seed, Stream.POSTERIOR, item.batch.index_B, item.grid)
        return Moments(item.latent_BLC, item.logvar_BLC).draw(z_BLC)

    def flush_caches(self) -> None:
        """Write what the caches hold in memory, and find what other ranks wrote.

        Raises:
            OSError: a part could not be written (a full disk). It stays in memory.
        """
        for cache in self.caches.values():
            cache.flush()
            cache.refresh()

    def noise(self, seed: int, stream: Stream, index_B: Tensor, grid: Grid | None = None) -> Tensor:
        """Standard normal (B, L, C) of these sample indices; `grid` None: that of data.image_px."""
        rows, columns = grid or self.grid
        length, channels = rows * columns, self.codec.token_channels
        flat = normal(seed, stream, index_B.to(self.codec.device), length * channels)
        return flat.view(-1, length, channels).to(self.codec.dtype)


def _keys(batch: Batch) -> list[str]:
    """Of the feature cache."""
    shown = zip(batch.hashes, batch.views, strict=True)
    return [feature_key(content_hash, view.name) for content_hash, view in shown]
