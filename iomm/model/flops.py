"""FLOPs by formula: what a step costs, so that throughput can be reported as TFLOP/s and pipeline stages
balanced.

A multiply-add counts two. Matrix products and attention are counted, element-wise work is not (it is bound by
bytes). All figures are of one forward pass for one sample; backward costs twice as much again.
"""

from iomm.config import GeneratorConfig
from iomm.model.blocks_z_image import mlp_width, modulation_channels
from iomm.model.mmdit import SINUSOIDS
from iomm.model.padding import padded
from iomm.model.single_stream import TIME_HIDDEN, TimeEmbedding


def generator_forward_flops(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> int:
    """The whole generator."""
    tokens = (image_tokens, condition_tokens)
    return first_cost(config, *tokens) + sum(block_costs(config, *tokens)) + last_cost(config, *tokens)


def block_costs(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> list[int]:
    """Each block that a pipeline deals out: double blocks, then single blocks."""
    if config.family == "z_image":
        d = config.hidden_size
        block = _z_image_block(config, padded(image_tokens) + padded(condition_tokens))
        return [block + 2 * 4 * modulation_channels(d) * d] * config.single_blocks
    return _flux_blocks(config, image_tokens, condition_tokens)


def first_cost(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> int:
    """What stands before the blocks: embeddings of the tokens and of the time; refiners."""
    d, c, e = config.hidden_size, config.token_channels, config.condition_width
    if config.family == "z_image":
        m, x, t = modulation_channels(d), padded(image_tokens), padded(condition_tokens)
        time = 2 * TIME_HIDDEN * (TimeEmbedding.FREQUENCIES + m)
        refiners = _z_image_block(config, x) + 2 * 4 * m * d + _z_image_block(config, t)
        return time + 2 * d * (x * c + t * e) + config.refiner_blocks * refiners
    inputs = [SINUSOIDS]
    inputs += [SINUSOIDS] if config.guidance_embedding else []
    inputs += [] if config.pooled_width is None else [config.pooled_width]
    return sum(2 * d * (width + d) for width in inputs) + 2 * d * (image_tokens * c + condition_tokens * e)


def last_cost(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> int:
    """What stands behind the blocks: modulation and projection of the image tokens."""
    del condition_tokens  # the image alone goes out
    d, c = config.hidden_size, config.token_channels
    if config.family == "z_image":
        return 2 * d * (image_tokens * c + modulation_channels(config.hidden_size))
    return 2 * d * (image_tokens * c + 2 * d)


def _flux_blocks(config: GeneratorConfig, image_tokens: int, condition_tokens: int) -> list[int]:
    """A double block, a token: qkv 3 d^2, out d^2, mlp 2 d f of width f; single block the same; attention
    2 s^2 d a block; modulation once a sample. Where double blocks stand last, the last one leaves out the
    condition stream's update.
    """
    d, s = config.hidden_size, image_tokens + condition_tokens
    mlp = 2 * d * int(d * config.mlp_ratio)
    block = s * 2 * (4 * d * d + mlp) + 4 * s * s * d
    costs = [block + 2 * 2 * 6 * d * d] * config.double_blocks + [
        block + 2 * 3 * d * d
    ] * config.single_blocks
    if not config.single_blocks:
        costs[-1] -= condition_tokens * (2 * (d * d + mlp) + 4 * s * d)
    return costs


def _z_image_block(config: GeneratorConfig, tokens: int) -> int:
    """A block without its modulation, a token: qkv 3 d^2, out d^2, SwiGLU 3 d f of width f; attention 2 s^2 d
    for s tokens, which are padded to multiples of 32.
    """
    d = config.hidden_size
    return tokens * 2 * (4 * d * d + 3 * d * mlp_width(d)) + 4 * tokens * tokens * d
