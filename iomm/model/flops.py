"""FLOPs by formula: what a step costs, so that throughput can be reported as TFLOP/s.

A multiply-add counts two. Matrix products and attention are counted, element-wise work is not (it is bound by
bytes).
"""

from iomm.config import GeneratorConfig
from iomm.model.mmdit import SINUSOIDS
from iomm.model.single_stream import MODULATION_CHANNELS, TIME_HIDDEN, TimeEmbedding, mlp_width, padded


def generator_forward_flops(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> int:
    """One forward pass for one sample. Backward costs twice as much again."""
    family = {"flux": _flux, "z_image": _z_image}[config.family]
    return int(family(config, image_tokens, condition_tokens))


def _flux(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> float:
    """A double block, a token: qkv 3 d^2, out d^2, mlp 2 r d^2; single block the same; attention 2 S^2 d a
    block; modulation once a sample. Where double blocks stand last, the last one leaves out the condition
    stream's update.
    """
    d, r, s = config.hidden_size, config.mlp_ratio, image_tokens + condition_tokens
    per_token = 2 * (4 + 2 * r) * d * d
    attention = 4 * s * s * d
    double = s * per_token + attention + 2 * 2 * 6 * d * d
    single = s * per_token + attention + 2 * 3 * d * d
    ends = 2 * d * (2 * image_tokens * config.token_channels + condition_tokens * config.condition_width)
    time = 2 * d * (SINUSOIDS + d) + 2 * 2 * d * d
    time += 2 * d * (SINUSOIDS + d) if config.guidance_embedding else 0
    time += 0 if config.pooled_width is None else 2 * d * (config.pooled_width + d)
    unread = 0 if config.single_blocks else condition_tokens * (2 * (1 + 2 * r) * d * d + 4 * s * d)
    return config.double_blocks * double - unread + config.single_blocks * single + ends + time


def _z_image(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> float:
    """A block, a token: qkv 3 d^2, out d^2, SwiGLU 3 d f of width f; attention 2 s^2 d a block; modulation
    4 m d a sample. Both streams are padded to multiples of 32; embedding and output see the tokens before.
    """
    d, m = config.hidden_size, min(config.hidden_size, MODULATION_CHANNELS)
    x, c = padded(image_tokens), padded(condition_tokens)

    def block(s: int) -> float:
        return s * 2 * (4 * d * d + 3 * d * mlp_width(d)) + 4 * s * s * d

    modulation = 2 * 4 * m * d
    refiners = config.refiner_blocks * (block(x) + modulation + block(c))
    joint = config.single_blocks * (block(x + c) + modulation)
    ends = 2 * d * (2 * image_tokens * config.token_channels + condition_tokens * config.condition_width + m)
    time = 2 * TIME_HIDDEN * (TimeEmbedding.FREQUENCIES + m)
    return refiners + joint + ends + time
