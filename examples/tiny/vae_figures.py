"""Reading the embedded images, and the figures of a tiny VAE: reconstruction PSNR, latent shift and scale.

Shapes: N images, B a part of them, C colour channels (3), H W pixels, K latent channels, h w latent sides
(H/8, W/8).
"""

import copy
import io
import tarfile
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

README = """# The tiny VAE

A diffusers `AutoencoderKL`, {parameters:,} parameters, stored in fp16: 64 px to 8 x 8 latents of {channels}
channels. Trained on the embedded train images only: {training}, on one CPU thread, by

    {command}

which also wrote this file. Reconstruction of the {heldout} held-out images, PSNR in dB, with noise of the
given level (relative to the latents' standard deviation) added before decoding:

| latent noise | mean over images | worst image |
|---|---|---|
{rows}

`(latent - ({shift})) * {scale}` has mean 0 and standard deviation 1 over the train images (`shift_factor`
and `scaling_factor` in config.json; latent = mean of the posterior).
"""


def load_images(shards: list[Path]) -> tuple[list[str], Tensor]:
    """Read every `KEY.webp` of the shards: keys, and images_NCHW uint8. ValueError if there is none."""
    keys, images = [], []
    for shard in shards:
        with tarfile.open(shard) as members:
            for member in members:
                if not member.name.endswith(".webp"):
                    continue
                payload = members.extractfile(member)
                assert payload is not None, f"{member.name} in {shard} is no regular file"
                with Image.open(io.BytesIO(payload.read())) as image:
                    rgb = image.convert("RGB")
                pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
                images.append(pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1))
                keys.append(member.name.removesuffix(".webp"))
    if not images:
        raise ValueError(
            f"{[str(shard) for shard in shards]} hold no .webp image. Give WebDataset shards of images."
        )
    return keys, torch.stack(images)


def to_signed(images_BCHW: Tensor) -> Tensor:
    """uint8 images to fp32 in [-1, 1]."""
    return images_BCHW.float() / 127.5 - 1


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step; a function of (seed, step) only."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@torch.no_grad()
def encode(vae: AutoencoderKL, images_NCHW: Tensor) -> Tensor:
    """The posterior means of uint8 images, as stored (neither shifted nor scaled): latent_NKhw fp32."""
    means = [vae.encoder(to_signed(part_BCHW)).chunk(2, dim=1)[0] for part_BCHW in images_NCHW.split(32)]
    return torch.cat(means)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images_NCHW: Tensor, *, noise_std: float = 0.0, seed: int = 0) -> Tensor:
    """Reconstruction PSNR of each uint8 image in dB, psnr_N; peak 1, output clamped to the range of images.

    noise_std: level of Gaussian noise added to the latents, relative to their standard deviation over all.
    """
    latent_NKhw = encode(vae, images_NCHW)
    noise_NKhw = torch.randn(latent_NKhw.shape, generator=step_generator(seed, 0))
    latent_NKhw = latent_NKhw + noise_std * latent_NKhw.std() * noise_NKhw
    output_NCHW = torch.cat([vae.decoder(part_BKhw) for part_BKhw in latent_NKhw.split(32)]).clamp(-1, 1)
    mse_N = ((output_NCHW - to_signed(images_NCHW)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * mse_N.log10()


def finish(vae: AutoencoderKL, train_NCHW: Tensor) -> AutoencoderKL:
    """A copy with weights rounded to fp16 (held in fp32), and shift and scale measured on the train images.

    With these, `(latent - shift_factor) * scaling_factor` has mean 0 and standard deviation 1 (train set).
    """
    rounded = copy.deepcopy(vae).half().float()
    latent_NKhw = encode(rounded, train_NCHW)
    rounded.register_to_config(
        shift_factor=round(latent_NKhw.mean().item(), 6),
        scaling_factor=round(1 / latent_NKhw.std().item(), 6),
    )
    return rounded


def save(vae: AutoencoderKL, heldout_NCHW: Tensor, out: Path, *, command: str, training: str) -> str:
    """Write a finished VAE (`finish`) to `out` as fp16 safetensors, with a README of its measured figures.

    command: what to type to train it; training: how long it was trained. Returns the figures as one line.
    """
    figures = {level: psnr(vae, heldout_NCHW, noise_std=level) for level in (0.0, 0.1, 0.2)}
    copy.deepcopy(vae).half().save_pretrained(out)
    rows = "\n".join(
        f"| {level} | {one_N.mean():.2f} | {one_N.min():.2f} |" for level, one_N in figures.items()
    )
    text = README.format(
        parameters=sum(p.numel() for p in vae.parameters()),
        heldout=len(heldout_NCHW),
        command=command,
        training=training,
        rows=rows,
        shift=vae.config["shift_factor"],
        scale=vae.config["scaling_factor"],
        channels=vae.config["latent_channels"],
    )
    (out / "README.md").write_text(text)
    return ", ".join(f"PSNR {one_N.mean():.2f} dB at noise {level}" for level, one_N in figures.items())
