"""Pictures from a system: of prompts, of images' own masked patch tokens, and of images and instructions.

    paint         [ prompt ]                          guidance scale
    reconstruct   [ aux prompt | patch tokens ]       guidance scale
    edit          [ instruction | patch tokens ]      an image and a text guidance scale

Each is a `Task`, a velocity and the noise to start from, that is then finished, or watched on its way.

B pictures, L latent tokens of C numbers, N patch tokens of F numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iomm.conditioning.prefix import Prefix
from iomm.encoders import Encoders
from iomm.flow.sampler import Guided, GuidedEdit, Method, Velocity, sample, trajectory
from iomm.random import Stream
from iomm.system import System


@dataclass(frozen=True)
class Task:
    """Pictures to be generated."""

    velocity: Guided | GuidedEdit
    noise_BLC: Tensor


@torch.no_grad()
def _velocity(system: System, encoders: Encoders, prefix: Prefix) -> Velocity:
    """The velocity under a condition, which is computed once, not once a step."""
    condition = system.condition(encoders.mllm, prefix)
    return lambda x_BLC, t_B: system.velocity(x_BLC, t_B, condition)


def _guided(
    system: System, encoders: Encoders, prefix: Prefix, null: Prefix, noise_BLC: Tensor, guidance: float
) -> Task:
    conditional = _velocity(system, encoders, prefix)
    unconditional = _velocity(system, encoders, null) if guidance != 1.0 else conditional
    return Task(Guided(conditional, unconditional, guidance), noise_BLC)


def _noise(encoders: Encoders, seed: int, first: int, pictures: int) -> Tensor:
    return encoders.noise(seed, Stream.SAMPLE, torch.arange(first, first + pictures))


def painting(
    system: System,
    encoders: Encoders,
    prompts: Sequence[str],
    *,
    seed: int,
    guidance: float,
    first: int = 0,
    null: Prefix | None = None,
) -> Task:
    """Pictures of prompts. Picture i starts from the noise of (seed, first + i).

    Args:
        null: what guidance leads away from; None: the null prompt.
    Raises:
        ValueError: a prompt without tokens, or with too many.
    """
    builder = encoders.prefixes
    null = null or builder.for_text([builder.config.null_prompt] * len(prompts))
    noise_BLC = _noise(encoders, seed, first, len(prompts))
    return _guided(system, encoders, builder.for_text(prompts), null, noise_BLC, guidance)


@torch.no_grad()
def reconstruction(
    system: System,
    encoders: Encoders,
    image_BCHW: Tensor,
    keep_BN: Tensor,
    *,
    seed: int,
    guidance: float = 1.0,
    first: int = 0,
) -> Task:
    """Pictures of images' own masked patch tokens.

    Args:
        image_BCHW: uint8 RGB.
        keep_BN: True where a patch token is kept; all False is the null condition.
        first: picture i starts from the noise of (seed, first + i).
    """
    builder, patches_BNF = encoders.prefixes, encoders.mllm.vision(image_BCHW)
    prefix = builder.for_images(patches_BNF, keep_BN)
    null = builder.for_images(patches_BNF, torch.zeros_like(keep_BN))
    noise_BLC = _noise(encoders, seed, first, len(image_BCHW))
    return _guided(system, encoders, prefix, null, noise_BLC, guidance)


@torch.no_grad()
def editing(
    system: System,
    encoders: Encoders,
    image_BCHW: Tensor,
    instructions: Sequence[str],
    keep_BN: Tensor,
    *,
    seed: int,
    image_guidance: float,
    text_guidance: float,
    aux_prompt: bool = False,
    first: int = 0,
) -> Task:
    """Zero-shot edits of images, by a model that was never trained to edit (the paper's ImgEdit result).

    Guided twice, as in InstructPix2Pix (arXiv 2211.09800, section 3.2.1): by the image alone, which is the
    condition of its reconstruction, against the null condition of image samples, and by image and instruction
    against the image alone. The paper does not say how it edits; this is ours.

    Args:
        image_BCHW: uint8 RGB.
        instructions: one an image.
        keep_BN: True where a patch token is kept, with the instruction and without.
        image_guidance: 0: the image alone does not count; 1: no guidance by it.
        text_guidance: 0: the instruction does not count; 1: no guidance by it.
        aux_prompt: the auxiliary prompt stands between the instruction and the image.
        first: picture i starts from the noise of (seed, first + i).
    Raises:
        ValueError: an instruction without tokens, or with too many, or not one an image.
    """
    builder, patches_BNF = encoders.prefixes, encoders.mllm.vision(image_BCHW)
    prefixes = (
        builder.for_edits(patches_BNF, keep_BN, instructions, aux_prompt=aux_prompt),
        builder.for_images(patches_BNF, keep_BN),
        builder.for_images(patches_BNF, torch.zeros_like(keep_BN)),
    )
    full, image, null = (_velocity(system, encoders, prefix) for prefix in prefixes)
    noise_BLC = _noise(encoders, seed, first, len(image_BCHW))
    return Task(GuidedEdit(full, image, null, image_guidance, text_guidance), noise_BLC)


def finish(system: System, encoders: Encoders, task: Task, *, steps: int, method: Method = "euler") -> Tensor:
    """A task's pictures, uint8 (B, 3, H, W)."""
    shift = system.config.flow.shift
    out = sample(task.velocity, task.noise_BLC, steps=steps, method=method, shift=shift)
    return encoders.codec.decode(out.x_BLC)


@torch.no_grad()
def watch(
    system: System, encoders: Encoders, task: Task, *, steps: int, every: int, method: Method = "euler"
) -> Iterator[tuple[int, Tensor]]:
    """A task's trajectory: (step, pictures), uint8 (B, 3, H, W).

    Every few steps the pictures as they are estimated so far, behind the last step the pictures themselves.

    Args:
        every: steps from one preview to the next.
    """
    shift = system.config.flow.shift
    path = trajectory(task.velocity, task.noise_BLC, steps=steps, method=method, shift=shift)
    for number, step in enumerate(path, start=1):
        if number == steps:
            yield number, encoders.codec.decode(step.x_BLC)
        elif number % every == 0:
            yield number, encoders.codec.decode(step.clean_BLC)


def paint(
    system: System,
    encoders: Encoders,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    method: Method = "euler",
    first: int = 0,
) -> Tensor:
    """The pictures of `painting`, uint8 (B, 3, H, W)."""
    task = painting(system, encoders, prompts, seed=seed, guidance=guidance, first=first)
    return finish(system, encoders, task, steps=steps, method=method)


def reconstruct(
    system: System,
    encoders: Encoders,
    image_BCHW: Tensor,
    keep_BN: Tensor,
    *,
    seed: int,
    steps: int,
    guidance: float = 1.0,
    method: Method = "euler",
    first: int = 0,
) -> Tensor:
    """The pictures of `reconstruction`, uint8 (B, 3, H, W)."""
    task = reconstruction(system, encoders, image_BCHW, keep_BN, seed=seed, guidance=guidance, first=first)
    return finish(system, encoders, task, steps=steps, method=method)


def edit(
    system: System,
    encoders: Encoders,
    image_BCHW: Tensor,
    instructions: Sequence[str],
    keep_BN: Tensor,
    *,
    seed: int,
    steps: int,
    image_guidance: float,
    text_guidance: float,
    aux_prompt: bool = False,
    method: Method = "euler",
    first: int = 0,
) -> Tensor:
    """The pictures of `editing`, uint8 (B, 3, H, W)."""
    task = editing(
        system,
        encoders,
        image_BCHW,
        instructions,
        keep_BN,
        seed=seed,
        image_guidance=image_guidance,
        text_guidance=text_guidance,
        aux_prompt=aux_prompt,
        first=first,
    )
    return finish(system, encoders, task, steps=steps, method=method)
