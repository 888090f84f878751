"""Frozen latent codecs: pixels <-> latent tokens.

                               down   channels   normalisation                                numbers a token
    AutoencoderKL (FLUX.1)     8      16         (latent - shift) * scale                     64 (patch 2)
    AutoencoderKLFlux2         8      32         (token - mean) / std, statistics of `bn`     128 (patch 2)
    AutoencoderDC (DC-AE)      32     32         latent * scale                               32 (patch 1)

Down and channels are of the published models; a loaded one says its own. B samples, L tokens, C numbers in a
token, H x W pixels.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from iomm.config import CodecConfig
from iomm.errors import first_line
from iomm.flow.path import Grid, patchify, unpatchify

EXAMPLE = "black-forest-labs/FLUX.1-schnell"


class Normalisation(Protocol):
    """Brings latent tokens to about zero mean and unit variance, and back."""

    @property
    def identity(self) -> str:
        """Everything it depends on beside the autoencoder's weights."""
        ...

    @property
    def log_gain(self) -> float | Tensor:
        """Logarithm of the factor that `forward` applies, (C,) or one for all."""
        ...

    def forward(self, x_BLC: Tensor) -> Tensor: ...

    def inverse(self, x_BLC: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Moments:
    """What the autoencoder makes of images: normalised latent tokens are distributed N(mean, exp(logvar))."""

    mean_BLC: Tensor
    logvar_BLC: Tensor | None  # None: the autoencoder is deterministic

    def draw(self, z_BLC: Tensor) -> Tensor:
        """Latent tokens (B, L, C) for standard normal `z_BLC`."""
        if self.logvar_BLC is None:
            return self.mean_BLC
        return self.mean_BLC + torch.exp(0.5 * self.logvar_BLC) * z_BLC


@dataclass(frozen=True)
class Affine:
    """(x - shift) * scale."""

    shift: float
    scale: float

    @property
    def identity(self) -> str:
        return f"{self.scale} {self.shift}"

    @property
    def log_gain(self) -> float:
        return math.log(abs(self.scale))

    def forward(self, x_BLC: Tensor) -> Tensor:
        return (x_BLC - self.shift) * self.scale

    def inverse(self, x_BLC: Tensor) -> Tensor:
        return x_BLC / self.scale + self.shift


@dataclass(frozen=True)
class Statistics:
    """(x - mean) / std, for each number of a token."""

    mean_C: Tensor
    std_C: Tensor
    identity: str

    @property
    def log_gain(self) -> Tensor:
        return -torch.log(self.std_C)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return (x_BLC - self.mean_C) / self.std_C

    def inverse(self, x_BLC: Tensor) -> Tensor:
        return x_BLC * self.std_C + self.mean_C


def _of_kl(vae: Any, config: CodecConfig) -> Normalisation:
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise ValueError(
            f"the AutoencoderKL at {config.path} declares latents_mean or latents_std, which FLUX.1's does "
            "not have and iomm does not apply. Set codec.path to another autoencoder."
        )
    return Affine(vae.config.shift_factor or 0.0, vae.config.scaling_factor)


def _of_flux2(vae: Any, config: CodecConfig) -> Normalisation:
    numbers = vae.config.latent_channels * config.patch**2
    if numbers != vae.bn.num_features:
        raise ValueError(
            f"codec.patch {config.patch} makes tokens of {numbers} numbers, but the autoencoder at "
            f"{config.path} has statistics of {vae.bn.num_features}. "
            f"Set codec.patch to {vae.config.patch_size[0]}."
        )
    eps = vae.config.batch_norm_eps
    return Statistics(vae.bn.running_mean, torch.sqrt(vae.bn.running_var + eps), f"bn {eps}")


def _of_dc(vae: Any, config: CodecConfig) -> Normalisation:
    return Affine(0.0, vae.config.scaling_factor)


# By the `_class_name` of config.json.
NORMALISATION: dict[str, Callable[[Any, CodecConfig], Normalisation]] = {
    "AutoencoderKL": _of_kl,
    "AutoencoderKLFlux2": _of_flux2,
    "AutoencoderDC": _of_dc,
}
DETERMINISTIC = ("AutoencoderDC",)  # of these, those that give a latent and no distribution


class LatentCodec:
    """A diffusers autoencoder of one of the classes in `NORMALISATION`, never trained.

    Args:
        vae: on its device.
        config: the patch, and whether latents are drawn.
    Raises:
        ValueError: a patch that the autoencoder's statistics are not made for, or latents to be drawn from an
            autoencoder that gives no distribution.
    """

    def __init__(self, vae: Any, config: CodecConfig) -> None:
        self.vae: Any = vae.eval().requires_grad_(False)
        self.dtype: torch.dtype = vae.dtype
        self.device: torch.device = vae.device
        self.patch = config.patch
        self.normalisation = NORMALISATION[type(vae).__name__](vae, config)
        self.channels: int = vae.config.latent_channels
        self.downsampling = _downsampling(vae)
        if config.sample and type(vae).__name__ in DETERMINISTIC:
            raise ValueError(
                f"codec.sample draws latents from a distribution, but the autoencoder at {config.path} (an "
                f"{type(vae).__name__}) gives none. Set codec.sample=false."
            )

    @property
    def token_channels(self) -> int:
        return self.channels * self.patch**2

    @property
    def token_px(self) -> int:
        """Pixels a side of one token."""
        return self.downsampling * self.patch

    def grid(self, height_px: int, width_px: int) -> Grid:
        """Token rows and columns of an image.

        Raises:
            ValueError: a side is not a multiple of pixels per token.
        """
        if height_px % self.token_px or width_px % self.token_px:
            raise ValueError(
                f"an image of {height_px} x {width_px} px is not made of whole tokens: both sides must be "
                f"multiples of the {self.token_px} pixels of one token. Change data.image_px, crop or resize."
            )
        return height_px // self.token_px, width_px // self.token_px

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """uint8 RGB images -> normalised latent tokens (B, L, C): the posterior's mean where there is one.

        Raises:
            ValueError: a side is not a multiple of pixels per token.
        """
        return self.moments(image_BCHW).mean_BLC

    @torch.no_grad()
    def moments(self, image_BCHW: Tensor) -> Moments:
        """uint8 RGB images -> mean and log-variance of their normalised latent tokens.

        Raises:
            ValueError: a side is not a multiple of pixels per token.
        """
        height_px, width_px = image_BCHW.shape[-2:]
        self.grid(height_px, width_px)
        out = self.vae.encode(image_BCHW.to(self.device, self.dtype) / 127.5 - 1)
        if not hasattr(out, "latent_dist"):
            return Moments(self.normalisation.forward(patchify(out.latent, self.patch)), None)
        mean_BLC = self.normalisation.forward(patchify(out.latent_dist.mode(), self.patch))
        logvar_BLC = patchify(out.latent_dist.logvar, self.patch) + 2 * self.normalisation.log_gain
        return Moments(mean_BLC, logvar_BLC)

    @torch.no_grad()
    def decode(self, x_BLC: Tensor, grid: Grid | None = None) -> Tensor:
        """Normalised latent tokens -> uint8 RGB (B, 3, H, W).

        Args:
            grid: of the tokens; None: a square.
        Raises:
            ValueError: L tokens do not fill the grid.
        """
        side = int(x_BLC.shape[1] ** 0.5)
        rows, columns = grid or (side, side)
        tokens = self.normalisation.inverse(x_BLC.to(self.device, self.dtype))
        image = self.vae.decode(unpatchify(tokens, self.patch, rows, columns)).sample
        return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def identity(self) -> str:
        """Hash of the weights and settings of `encode`; keys the feature cache."""
        digest = hashlib.sha256(f"{self.normalisation.identity} {self.patch} {self.dtype}".encode())
        for name, tensor in self.vae.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def open_codec(config: CodecConfig, dtype: torch.dtype, device: torch.device) -> LatentCodec:
    """Load the autoencoder at `config.path`, a diffusers folder or a hub name.

    Raises:
        FileNotFoundError: nothing there, or no weights in safetensors; the message says what to download and
            where to put it.
        ValueError: another class of autoencoder, or a patch that does not fit it.
    """
    import diffusers

    path = Path(config.path)
    local = path.is_dir() or path.is_absolute() or config.path.startswith(".") or config.path.count("/") > 1
    if local and not (path / "config.json").is_file():
        raise _missing(config, f"{path / 'config.json'} is missing")
    try:
        settings = _load_settings(config)
        declared = settings.get("_class_name")
        if declared not in NORMALISATION:
            raise ValueError(
                f"the autoencoder at {config.path} is a {declared}; known are {', '.join(NORMALISATION)}. "
                "Set codec.path to one of these."
            )
        vae: Any = getattr(diffusers, declared).from_pretrained(
            config.path,
            revision=config.revision,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            use_safetensors=True,
        )
    except OSError as error:
        raise _missing(config, first_line(error)) from error
    return LatentCodec(vae.to(device), config)


def _load_settings(config: CodecConfig) -> dict[str, Any]:
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

    with warnings.catch_warnings():
        # diffusers hands huggingface_hub an argument that it no longer takes.
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
        settings: Any = AutoencoderKL.load_config(config.path, revision=config.revision)
    return settings


def _downsampling(vae: Any) -> int:
    """Pixels a side of one latent pixel."""
    if hasattr(vae, "spatial_compression_ratio"):
        return vae.spatial_compression_ratio
    return 2 ** sum(block.downsamplers is not None for block in vae.encoder.down_blocks)


def _missing(config: CodecConfig, what: str) -> FileNotFoundError:
    path = Path(config.path)
    if config.path.count("/") == 1 and not config.path.startswith((".", "/")):
        command, target = f"hf download {config.path} --local-dir DIR", "DIR"
        what = f"there is no such folder, and as a hub name: {what}"
    else:
        folder = path.parent if path.name == "vae" else path
        command, target = f"hf download {EXAMPLE} --include 'vae/*' --local-dir {folder}", f"{folder}/vae"
    return FileNotFoundError(
        f"no autoencoder at {config.path}: {what}. Download one where there is a network (`{command}`) and "
        f"set codec.path={target}."
    )
