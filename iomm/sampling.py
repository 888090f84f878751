"""Pictures from a system: of prompts, and of images' own masked patch tokens.

B pictures, L latent tokens of C numbers, N patch tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from iomm.conditioning.prefix import Prefix
from iomm.encoders import Encoders
from iomm.flow.sampler import Guided, Method, Sampled, sample
from iomm.random import Stream
from iomm.system import System


@torch.no_grad()
def generate(
    system: System,
    encoders: Encoders,
    prefix: Prefix,
    null: Prefix,
    noise_BLC: Tensor,
    *,
    steps: int,
    guidance: float,
    method: Method = "euler",
) -> Sampled:
    """Latents for a condition, guided against the null condition. The conditions are computed once, not once
    a step."""
    conditional = system.condition(encoders.mllm, prefix)
    unconditional = system.condition(encoders.mllm, null) if guidance != 1.0 else conditional
    velocity = Guided(
        lambda x, t: system.velocity(x, t, conditional),
        lambda x, t: system.velocity(x, t, unconditional),
        guidance,
    )
    return sample(velocity, noise_BLC, steps=steps, method=method, shift=system.config.flow.shift)


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
    """Pictures of prompts, uint8 (B, 3, H, W). Picture i starts from the noise of (seed, first + i)."""
    builder = encoders.prefixes
    null = builder.for_text([builder.config.null_prompt] * len(prompts))
    noise = encoders.noise(seed, Stream.SAMPLE, torch.arange(first, first + len(prompts)))
    out = generate(
        system,
        encoders,
        builder.for_text(prompts),
        null,
        noise,
        steps=steps,
        guidance=guidance,
        method=method,
    )
    return encoders.codec.decode(out.x_BLC)


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
) -> Tensor:
    """Pictures generated from images' own masked patch tokens, uint8 (B, 3, H, W).

    Args:
        image_BCHW: uint8 RGB.
        keep_BN: True where a patch token is kept; all False is the null condition.
    """
    builder, patches_BNF = encoders.prefixes, encoders.mllm.vision(image_BCHW)
    prefix = builder.for_images(patches_BNF, keep_BN)
    null = builder.for_images(patches_BNF, torch.zeros_like(keep_BN))
    noise = encoders.noise(seed, Stream.SAMPLE, torch.arange(len(image_BCHW)))
    out = generate(system, encoders, prefix, null, noise, steps=steps, guidance=guidance, method=method)
    return encoders.codec.decode(out.x_BLC)
