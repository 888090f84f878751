"""Train the tiny VAE that ships in `examples/tiny/vae`: 64 px images to 8 x 8 latents of 16 channels.

    python -m examples.tiny.train_vae                 the shipped recipe, about ten minutes of one CPU core
    python -m examples.tiny.train_vae --steps 200 --out /tmp/vae

It is a diffusers `AutoencoderKL` in the latent layout of FLUX (8x down, 16 channels, no quant convolutions):
code written against the tiny VAE meets the same shapes with the real one. A flow-matching generator will
paint in this latent space and err a little everywhere; therefore Gaussian noise *relative to the standard
deviation of the latents* is added before decoding during training (a relative level leaves the encoder no
way out by scaling up). Each image draws its own level, uniform in [0, 2 * noise_std]: clean latents are
served as well. Where it starts from, see `vae_start.py`: that is what makes it quick.

Loss, on images in [-1, 1]:  L1 + 5 L2 + 0.5 L1 of the horizontal and vertical differences + 1e-6 KL.
Only train shards are read; the held-out shard serves for the figures in the README this script writes.
Everything random is a function of (seed, step), on one thread: two runs on one machine give the same bytes.

Shapes: B batch, C colour channels (3), H W pixels, K latent channels (16), h w latent sides (H/8, W/8),
N images.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from examples.tiny.vae_figures import finish, load_images, save, step_generator, to_signed
from examples.tiny.vae_start import start_from_patches

HERE = Path(__file__).resolve().parent
SHARDS = HERE.parent / "data" / "fluent_emoji"


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """Every setting of the training."""

    steps: int = 3500
    batch_images: int = 4
    learning_rate: float = 1.5e-3  # peak; cosine to zero after the warm-up
    encoder_pace: float = 0.2  # the encoder's learning rate over the decoder's: it starts close to good
    warmup_steps: int = 100
    clip_norm: float = 1.0
    ema_decay: float = 0.998  # the average is what is saved
    kl_weight: float = 1e-6  # per latent element
    whole_steps: int = (
        400  # the last steps see whole images; those before, random crops at a third of the cost
    )
    crop_px: int = 32
    noise_warmup_steps: int = 500  # the latent noise grows linearly from nothing
    noise_std: float = 0.1  # mean level of the latent noise, relative to the latents' standard deviation
    # of the four resolutions from 64 px down to 8; each a multiple of `groups`
    channels: tuple[int, int, int, int] = (16, 32, 64, 96)
    # of the normalisations: more would take the level of flat areas away, as a group holds few channels
    groups: int = 1
    latent_channels: int = 16
    seed: int = 0


def build_vae(recipe: VaeRecipe) -> AutoencoderKL:
    """An untrained VAE with random weights."""
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
    return AutoencoderKL(**settings)


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
    recolours_B = (~plain_B) & (uniform(0, 1) < 0.2)
    order_BC = torch.where(recolours_B[:, None], order_BC, torch.arange(3))
    unit_BCHW = unit_BCHW.gather(1, order_BC[:, :, None, None].expand_as(unit_BCHW))

    whiteness_B1HW = unit_BCHW.amin(1, keepdim=True) ** 8
    colour_BC11 = uniform(0, 1, 3, 1, 1)
    paints_B111 = ((~plain_B) & (uniform(0, 1) < 0.2))[:, None, None, None]
    painted_BCHW = unit_BCHW * (1 - whiteness_B1HW) + colour_BC11 * whiteness_B1HW
    return torch.where(paints_B111, painted_BCHW, unit_BCHW) * 2 - 1


def crop(images_BCHW: Tensor, side_px: int, rng: torch.Generator) -> Tensor:
    """The same random square of every image: crop_BChw with h = w = side_px."""
    top = int(torch.randint(images_BCHW.shape[2] - side_px + 1, (), generator=rng))
    left = int(torch.randint(images_BCHW.shape[3] - side_px + 1, (), generator=rng))
    return images_BCHW[:, :, top : top + side_px, left : left + side_px]


def reconstruction_loss(output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """L1 + 5 L2 + 0.5 L1 of the differences between neighbouring pixels; a scalar."""
    error_BCHW = output_BCHW - target_BCHW
    edges = error_BCHW.diff(dim=2).abs().mean() + error_BCHW.diff(dim=3).abs().mean()
    return error_BCHW.abs().mean() + 5 * error_BCHW.square().mean() + 0.5 * edges


def vae_loss(
    vae: AutoencoderKL, target_BCHW: Tensor, recipe: VaeRecipe, noise_std: float, rng: torch.Generator
) -> Tensor:
    """The training loss of a batch in [-1, 1]: encode, sample, add relative noise, decode."""
    mean_BKhw, logvar_BKhw = vae.encoder(target_BCHW).chunk(2, dim=1)
    logvar_BKhw = logvar_BKhw.clamp(-30, 20)
    latent_BKhw = mean_BKhw + (0.5 * logvar_BKhw).exp() * torch.randn(mean_BKhw.shape, generator=rng)
    level_B111 = torch.rand(len(mean_BKhw), 1, 1, 1, generator=rng) * 2 * noise_std * mean_BKhw.std()
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
    start_from_patches(vae, to_signed(images_NCHW[::3]))
    average.load_state_dict(vae.state_dict())
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parts = [
        {"params": list(vae.encoder.parameters()), "pace": recipe.encoder_pace},
        {"params": list(vae.decoder.parameters()), "pace": 1.0},
    ]
    optimizer = torch.optim.AdamW(parts, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    losses = []
    for step in range(recipe.steps):
        rng = step_generator(recipe.seed, step)
        chosen_B = torch.randint(len(images_NCHW), (recipe.batch_images,), generator=rng)
        target_BCHW = augment(images_NCHW[chosen_B], rng)
        if step < recipe.steps - recipe.whole_steps:
            target_BCHW = crop(target_BCHW, recipe.crop_px, rng)
        target_BCHW = target_BCHW.contiguous(memory_format=torch.channels_last)

        noise_std = recipe.noise_std * min(1.0, step / recipe.noise_warmup_steps)
        loss = vae_loss(vae, target_BCHW, recipe, noise_std, rng)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss is {loss.item()} at step {step}; it must be finite. Lower --learning-rate."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), recipe.clip_norm)
        for part in optimizer.param_groups:
            part["lr"] = part["pace"] * learning_rate_at(step, recipe)
        optimizer.step()

        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        losses.append(loss.item())
        after_step(step + 1, losses[-1], average)
    return average, losses


def main(arguments: list[str] | None = None) -> None:
    """Command line: train, saving the averaged model every `--save-every-steps` and at the end."""
    default = VaeRecipe()
    parser = argparse.ArgumentParser(description="Train the tiny VAE on the embedded train images.")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--save-every-steps", type=int, default=2500)
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
                figures = save(
                    finish(average, train_NCHW),
                    heldout_NCHW,
                    given.out,
                    command=f"python -m examples.tiny.train_vae --steps {recipe.steps} --seed {recipe.seed}",
                    training=f"{done} of {recipe.steps} steps of {recipe.batch_images} images",
                )
                progress.console.print(f"step {done}: {figures}")

        train(train_NCHW, recipe, after_step)
    sys.stdout.write(f"{given.out}\n")


if __name__ == "__main__":
    main()
