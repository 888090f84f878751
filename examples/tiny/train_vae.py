"""Train the tiny VAE that ships in `examples/tiny/vae`: 64 px images to 8 x 8 latents of 16 channels.

    python examples/tiny/train_vae.py                 the shipped recipe, about half an hour on one CPU core
    python examples/tiny/train_vae.py --steps 200 --out /tmp/vae

It is a diffusers `AutoencoderKL` in the latent layout of FLUX (8x down, 16 channels, no quant convolutions):
code written against the tiny VAE meets the same shapes with the real one. A flow-matching generator will
paint in this latent space and err a little everywhere; therefore Gaussian noise *relative to the standard
deviation of the latents* is added before decoding during training (a relative level leaves the encoder no
way out by scaling up). Each image draws its own level, uniform in [0, 2 * noise_std]: clean latents are
served as well.

Loss, on images in [-1, 1]:  L1 + 5 L2 + 0.5 L1 of the horizontal and vertical differences + 1e-6 KL.
Only train shards are read; the held-out shard serves for the figures in the README this script writes.
Everything random is a function of (seed, step), on one thread: two runs on one machine give the same bytes.

Shapes: B batch, C colour channels (3), H W pixels, K latent channels (16), h w latent sides (H/8, W/8),
N images.
"""

import argparse
import copy
import io
import math
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

HERE = Path(__file__).resolve().parent
SHARDS = HERE.parent / "data" / "fluent_emoji"

README = """# The tiny VAE

A diffusers `AutoencoderKL`, {parameters:,} parameters, stored in fp16: 64 px to 8 x 8 latents of
{recipe.latent_channels} channels. Trained on the embedded train images only, for {steps_done} of
{recipe.steps} steps of {recipe.batch_images} images, on one CPU thread, by

    python examples/tiny/train_vae.py --steps {recipe.steps} --seed {recipe.seed}

which also wrote this file. Reconstruction of the {heldout} held-out images, PSNR in dB, with noise of the
given level (relative to the latents' standard deviation) added before decoding:

| latent noise | mean over images | worst image |
|---|---|---|
{rows}

`(latent - {shift}) * {scale}` has mean 0 and standard deviation 1 over the train images (`shift_factor`
and `scaling_factor` in config.json; latent = mean of the posterior).
"""


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """Every setting of the training."""

    steps: int = 5000
    batch_images: int = 8
    learning_rate: float = 2e-3  # peak; cosine to zero after the warm-up
    warmup_steps: int = 100
    clip_norm: float = 1.0
    ema_decay: float = 0.998  # the average is what is saved
    kl_weight: float = 1e-6  # per latent element
    noise_std: float = 0.1  # mean level of the latent noise, relative to the latents' standard deviation
    # of the four resolutions from 64 px down to 8; each a multiple of `groups`
    channels: tuple[int, int, int, int] = (16, 32, 64, 96)
    groups: int = 8
    latent_channels: int = 16
    seed: int = 0


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


def build_vae(recipe: VaeRecipe) -> AutoencoderKL:
    """An untrained VAE. Its log-variance starts near -6, so the decoder sees the mean from the first step."""
    settings: dict[str, Any] = {  # diffusers annotates its tuples with one element
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": recipe.channels,
        "layers_per_block": 1,
        "latent_channels": recipe.latent_channels,
        "norm_num_groups": recipe.groups,
        "sample_size": 64,
        "force_upcast": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
    vae = AutoencoderKL(**settings)
    bias = vae.encoder.conv_out.bias
    assert bias is not None
    with torch.no_grad():
        bias[recipe.latent_channels :] = -6.0
    return vae


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step; a function of (seed, step) only."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def augment(images_BCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Flip, shift, scale, recolour the white background and permute colours, each image on its own.

    images_BCHW uint8 -> fp32 in [-1, 1]. Three images in ten are only flipped.
    """
    batch = len(images_BCHW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=rng) * (high - low) + low

    plain_B = uniform(0, 1) < 0.3
    flip_B = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    moves_B = (~plain_B) & (uniform(0, 1) < 0.6)
    zoom_B = torch.where(moves_B, uniform(0.75, 1.3), 1.0)
    shift_B2 = torch.where(moves_B[:, None], uniform(-0.25, 0.25, 2), 0.0)
    theta_B23 = torch.zeros(batch, 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1], theta_B23[:, :, 2] = zoom_B * flip_B, zoom_B, shift_B2
    grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
    unit_BCHW = images_BCHW.float() / 255
    unit_BCHW = F.grid_sample(unit_BCHW, grid_BHW2, padding_mode="border", align_corners=False)

    order_BC = torch.argsort(uniform(0, 1, 3), dim=1)
    recolours_B = (~plain_B) & (uniform(0, 1) < 0.4)
    order_BC = torch.where(recolours_B[:, None], order_BC, torch.arange(3))
    unit_BCHW = unit_BCHW.gather(1, order_BC[:, :, None, None].expand_as(unit_BCHW))

    whiteness_B1HW = unit_BCHW.amin(1, keepdim=True) ** 8
    colour_BC11 = uniform(0, 1, 3, 1, 1)
    paints_B111 = ((~plain_B) & (uniform(0, 1) < 0.4))[:, None, None, None]
    painted_BCHW = unit_BCHW * (1 - whiteness_B1HW) + colour_BC11 * whiteness_B1HW
    return torch.where(paints_B111, painted_BCHW, unit_BCHW) * 2 - 1


def reconstruction_loss(output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """L1 + 5 L2 + 0.5 L1 of the differences between neighbouring pixels; a scalar."""
    error_BCHW = output_BCHW - target_BCHW
    edges = error_BCHW.diff(dim=2).abs().mean() + error_BCHW.diff(dim=3).abs().mean()
    return error_BCHW.abs().mean() + 5 * error_BCHW.square().mean() + 0.5 * edges


def vae_loss(vae: AutoencoderKL, target_BCHW: Tensor, recipe: VaeRecipe, rng: torch.Generator) -> Tensor:
    """The training loss of a batch in [-1, 1]: encode, sample, add relative noise, decode."""
    mean_BKhw, logvar_BKhw = vae.encoder(target_BCHW).chunk(2, dim=1)
    logvar_BKhw = logvar_BKhw.clamp(-30, 20)
    latent_BKhw = mean_BKhw + (0.5 * logvar_BKhw).exp() * torch.randn(mean_BKhw.shape, generator=rng)
    level_B111 = torch.rand(len(mean_BKhw), 1, 1, 1, generator=rng) * 2 * recipe.noise_std * mean_BKhw.std()
    latent_BKhw = latent_BKhw + level_B111 * torch.randn(mean_BKhw.shape, generator=rng)
    kl = 0.5 * (mean_BKhw.square() + logvar_BKhw.exp() - 1 - logvar_BKhw).mean()
    return reconstruction_loss(vae.decoder(latent_BKhw), target_BCHW) + recipe.kl_weight * kl


def learning_rate_at(step: int, recipe: VaeRecipe) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def train(
    images_NCHW: Tensor,
    recipe: VaeRecipe,
    after_step: Callable[[int, float, AutoencoderKL], None] = lambda step, loss, average: None,
) -> tuple[AutoencoderKL, list[float]]:
    """Train on images_NCHW (uint8); returns the averaged model and the loss of every step.

    `after_step(steps done, loss, averaged model)` is called after each step. Raises ValueError if a loss is
    not finite.
    """
    torch.manual_seed(recipe.seed)
    vae, average = build_vae(recipe), build_vae(recipe)
    average.load_state_dict(vae.state_dict())
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(recipe.steps):
        rng = step_generator(recipe.seed, step)
        chosen_B = torch.randint(len(images_NCHW), (recipe.batch_images,), generator=rng)
        target_BCHW = augment(images_NCHW[chosen_B], rng).contiguous(memory_format=torch.channels_last)

        loss = vae_loss(vae, target_BCHW, recipe, rng)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss is {loss.item()} at step {step}; it must be finite. Lower --learning-rate."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), recipe.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, recipe)
        optimizer.step()

        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), vae.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(loss.item())
        after_step(step + 1, losses[-1], average)
    return average, losses


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


def save(vae: AutoencoderKL, heldout_NCHW: Tensor, recipe: VaeRecipe, steps_done: int, out: Path) -> str:
    """Write a finished VAE (`finish`) to `out` as fp16 safetensors, with a README of its measured figures.

    Returns the figures as one line.
    """
    figures = {level: psnr(vae, heldout_NCHW, noise_std=level) for level in (0.0, 0.1, 0.2)}
    copy.deepcopy(vae).half().save_pretrained(out)
    rows = "\n".join(
        f"| {level} | {one_N.mean():.2f} | {one_N.min():.2f} |" for level, one_N in figures.items()
    )
    text = README.format(
        parameters=sum(p.numel() for p in vae.parameters()),
        heldout=len(heldout_NCHW),
        steps_done=steps_done,
        rows=rows,
        shift=vae.config["shift_factor"],
        scale=vae.config["scaling_factor"],
        recipe=recipe,
    )
    (out / "README.md").write_text(text)
    return ", ".join(f"PSNR {one_N.mean():.2f} dB at noise {level}" for level, one_N in figures.items())


def main(arguments: list[str] | None = None) -> None:
    """Command line: train, saving the averaged model every `--save-every-steps` and at the end."""
    default = VaeRecipe()
    parser = argparse.ArgumentParser(description="Train the tiny VAE on the embedded train images.")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--save-every-steps", type=int, default=1500)
    parser.add_argument(
        "--shards", type=Path, default=SHARDS, help="folder with train-*.tar and heldout-*.tar"
    )
    parser.add_argument("--out", type=Path, default=HERE / "vae", help="folder the model is written to")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = VaeRecipe(steps=given.steps, seed=given.seed, learning_rate=given.learning_rate)
    train_NCHW = load_images(sorted(given.shards.glob("train-*.tar")))[1]
    heldout_NCHW = load_images(sorted(given.shards.glob("heldout-*.tar")))[1]
    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        recent: list[float] = []
        bar = progress.add_task("train", total=recipe.steps, loss=math.nan)

        def after_step(done: int, loss: float, average: AutoencoderKL) -> None:
            progress.update(bar, completed=done, loss=loss)
            recent.append(loss)
            if done % 100 == 0:
                progress.console.print(
                    f"step {done}: mean loss of the last 100 steps {sum(recent[-100:]) / 100:.4f}"
                )
            if done % given.save_every_steps == 0 or done == recipe.steps:
                figures = save(finish(average, train_NCHW), heldout_NCHW, recipe, done, given.out)
                progress.console.print(f"step {done}: {figures}")

        train(train_NCHW, recipe, after_step)
    sys.stdout.write(f"{given.out}\n")


if __name__ == "__main__":
    main()
