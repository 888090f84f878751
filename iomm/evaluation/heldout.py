"""Watching a run without a judge: held-out velocity loss, and the copying alarm (METHOD.md section 5).

The loss is taken at 8 fixed timesteps with fixed noise (as MLPerf does), so that two evaluations differ by
the weights only. Three conditions: the image's own masked tokens, the caption, and the null prompt. A
generator that uses its condition has a lower loss with image and text than with null.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from iomm.conditioning.mask import keep_tokens
from iomm.conditioning.prefix import Prefix
from iomm.encoders import Encoded, Encoders
from iomm.flow.loss import velocity_loss
from iomm.flow.path import interpolate, velocity_target
from iomm.flow.timesteps import evaluation_timesteps
from iomm.parallel.mesh import Mesh
from iomm.random import Stream
from iomm.sampling import reconstruct
from iomm.system import Condition, System

EVAL_SEED = 20_260_316  # of noise and masks; fixed, so that runs with different seeds compare
CONDITIONS = ("image", "text", "null")
LEAK_DB = 3.0  # the null condition may not be closer to its own image than to another by more than this
COPY_DB = 30.0  # nor may a condition that hides most tokens return the image better than this


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean velocity loss by condition, and by condition and timestep."""

    timesteps: list[float]
    by_timestep: dict[str, list[float]]

    @property
    def mean(self) -> dict[str, float]:
        return {name: sum(losses) / len(losses) for name, losses in self.by_timestep.items()}


@dataclass(frozen=True)
class Copying:
    """PSNR in dB of pictures generated from the null condition and from the masked condition, against their
    own image and (mean) against the others."""

    psnr_null_db: float
    psnr_null_other_db: float
    psnr_image_db: float
    mask_ratio: float

    @property
    def reason(self) -> str | None:
        """Why the alarm rings; None if it does not."""
        gap = self.psnr_null_db - self.psnr_null_other_db
        if gap > LEAK_DB:
            return (
                f"with every token masked the picture is {gap:.1f} dB closer to its own image than to "
                "another: the image leaks past the mask"
            )
        if self.mask_ratio > 0 and self.psnr_image_db > COPY_DB:
            return (
                f"from {1 - self.mask_ratio:.0%} of its tokens the image comes back at "
                f"{self.psnr_image_db:.1f} dB: the generator "
                "copies; raise condition.mask_ratio"
            )
        return None


def masked_images(encoders: Encoders, item: Encoded) -> Prefix:
    """The condition of each sample's own image under the held-out losses' mask."""
    assert item.patches_BNF is not None, "held-out samples are encoded with captioned_too=True"
    builder, tokens = encoders.prefixes, encoders.mllm.image_tokens
    keep_BN = keep_tokens(EVAL_SEED, item.batch.index_B, tokens, builder.config.mask_ratio)
    return builder.for_images(item.patches_BNF, keep_BN)


def _prefixes(encoders: Encoders, item: Encoded) -> Iterator[tuple[str, Prefix]]:
    builder, batch = encoders.prefixes, item.batch
    yield "image", masked_images(encoders, item)
    yield "text", builder.for_text([caption or builder.config.null_prompt for caption in batch.captions])
    yield "null", builder.for_text([builder.config.null_prompt] * len(batch.captions))


def loss_by_timestep(system: System, x_BLC: Tensor, noise_BLC: Tensor, condition: Condition) -> Tensor:
    """Velocity loss under a condition, summed over the samples: fp64, one a timestep, on the CPU."""
    losses = []
    for t in evaluation_timesteps().tolist():
        t_B = torch.full((len(noise_BLC),), t, device=noise_BLC.device)
        velocity_BLC = system.velocity(interpolate(x_BLC, noise_BLC, t_B), t_B, condition)
        loss_B = velocity_loss(velocity_BLC, velocity_target(x_BLC, noise_BLC))
        losses.append(loss_B.double().sum().cpu())
    return torch.stack(losses)


@torch.no_grad()
def heldout_loss(
    system: System, encoders: Encoders, items: list[Encoded], mesh: Mesh, samples: int
) -> HeldoutLoss:
    """Held-out velocity loss.

    Args:
        items: this rank's held-out batches, encoded with `captioned_too`.
        samples: held-out samples on all data-parallel ranks together.
    """
    timesteps = evaluation_timesteps()
    total = torch.zeros(len(CONDITIONS), len(timesteps), dtype=torch.float64)
    for item in items:
        x_BLC, noise = item.latent_BLC, encoders.noise(EVAL_SEED, Stream.NOISE, item.batch.index_B)
        for row, (_, prefix) in enumerate(_prefixes(encoders, item)):
            condition = system.condition(encoders.mllm, prefix)
            total[row] += loss_by_timestep(system, x_BLC, noise, condition)
    mean = mesh.mean_over_dp(total.to(mesh.device)).cpu() * mesh.dp_size / samples
    return HeldoutLoss(timesteps.tolist(), {name: mean[row].tolist() for row, name in enumerate(CONDITIONS)})


def psnr_db(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images, (B,), in dB; identical images count as 100."""
    error_B = (a_BCHW.float() - b_BCHW.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error_B.clamp_min(255**2 * 1e-10))


def copying(
    system: System, encoders: Encoders, image_BCHW: Tensor, index_B: Tensor, steps: int
) -> tuple[Copying, Tensor, Tensor]:
    """The copying check, with the pictures it made: (check, from the masked condition, from the null
    condition).

    Args:
        image_BCHW: at least two uint8 images.
    """
    image_BCHW = image_BCHW.to(encoders.codec.device)
    ratio = encoders.prefixes.config.mask_ratio
    keep = keep_tokens(EVAL_SEED, index_B, encoders.mllm.image_tokens, ratio)
    masked = reconstruct(system, encoders, image_BCHW, keep, seed=EVAL_SEED, steps=steps)
    null = reconstruct(system, encoders, image_BCHW, torch.zeros_like(keep), seed=EVAL_SEED, steps=steps)
    others = [psnr_db(null, image_BCHW.roll(shift, 0)).mean() for shift in range(1, len(image_BCHW))]
    own, image = psnr_db(null, image_BCHW).mean(), psnr_db(masked, image_BCHW).mean()
    check = Copying(own.item(), torch.stack(others).mean().item(), image.item(), ratio)
    return check, masked, null
