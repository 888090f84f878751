"""Frozen latent codecs: pixels <-> latent tokens.

`AutoencoderKL` in FLUX's layout: x = (latent - shift) * scale, packed 2x2 (16 channels, 8x down: 64 numbers a
token). B samples, L tokens, C numbers in a token, H x W pixels.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iomm.config import CodecConfig
from iomm.flow.path import patchify, unpatchify


class LatentCodec:
    """A diffusers `AutoencoderKL`, never trained.

    Raises:
        FileNotFoundError: nothing at `config.path`.
        ValueError: another autoencoder class.
    """

    def __init__(self, config: CodecConfig, dtype: torch.dtype, device: torch.device) -> None:
        from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

        path = Path(config.path)
        if (path.is_absolute() or config.path.count("/") > 1) and not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"no autoencoder at {config.path}: {path / 'config.json'} is missing. Put a "
                "diffusers folder there, or set codec.path "
                "to one (for instance the vae/ folder of a FLUX.1 download)."
            )
        settings: Any = AutoencoderKL.load_config(config.path, revision=config.revision)
        declared = settings["_class_name"]
        if declared != "AutoencoderKL":
            raise ValueError(
                f"the autoencoder at {config.path} is a {declared}; this version takes AutoencoderKL."
            )
        vae: Any = AutoencoderKL.from_pretrained(
            config.path, revision=config.revision, torch_dtype=dtype, low_cpu_mem_usage=False
        )
        self.vae: Any = vae.to(device).eval().requires_grad_(False)
        self.dtype, self.device, self.patch = dtype, device, config.patch
        self.scale: float = self.vae.config.scaling_factor
        self.shift: float = self.vae.config.shift_factor or 0.0
        self.channels: int = self.vae.config.latent_channels
        self.downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def token_channels(self) -> int:
        return self.channels * self.patch**2

    def grid(self, image_px: int) -> int:
        """Tokens along one side of a square image.

        Raises:
            ValueError: the side is not a multiple of pixels per token.
        """
        unit = self.downsampling * self.patch
        if image_px % unit:
            raise ValueError(
                f"data.image_px {image_px} is not a multiple of the {unit} pixels of one token. "
                "Choose a multiple."
            )
        return image_px // unit

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """uint8 RGB images -> normalised latent tokens (B, L, C): the posterior's mean."""
        x = image_BCHW.to(self.device, self.dtype) / 127.5 - 1
        return patchify((self.vae.encode(x).latent_dist.mode() - self.shift) * self.scale, self.patch)

    @torch.no_grad()
    def decode(self, x_BLC: Tensor) -> Tensor:
        """Normalised latent tokens of square images -> uint8 RGB (B, 3, H, W)."""
        side = int(x_BLC.shape[1] ** 0.5)
        latent = (
            unpatchify(x_BLC.to(self.device, self.dtype), self.patch, side, side) / self.scale + self.shift
        )
        return ((self.vae.decode(latent).sample.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def identity(self) -> str:
        """Hash of the weights and settings of `encode`; keys the feature cache."""
        digest = hashlib.sha256(f"{self.scale} {self.shift} {self.patch} {self.dtype}".encode())
        for name, tensor in self.vae.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]
