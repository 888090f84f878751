"""Every weight that a rank trains, by name and shape, without building a module; and what weights cost.

The names and shapes are those of `System` on that rank (tests/plan/test_weights.py compares them with modules
built on the meta device).
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from iomm.config import ConditionConfig, Config, GeneratorConfig
from iomm.model.blocks_z_image import mlp_width, modulation_channels
from iomm.model.mmdit import SINUSOIDS
from iomm.model.single_stream import TIME_HIDDEN, TimeEmbedding
from iomm.parallel.muon import ADAMW
from iomm.parallel.stages import Chunk
from iomm.plan.shapes import CodecShape

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A weight, or this tensor-parallel rank's slice of one."""

    shape: Shape
    trained: bool = True
    split: tuple[int, int] = field(default=(1, 1), compare=False)  # over how many ranks, a matrix's each side

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


Weights = dict[str, Weight]


@functools.cache
def generator_weights(config: GeneratorConfig, tp: int, chunks: tuple[Chunk, ...]) -> Weights:
    """Of a rank that holds these chunks. Shared between callers: not to be changed."""
    found = dict(_flux(config, tp, chunks) if config.family == "flux" else _z_image(config, tp, chunks))
    return {f"generator.{name}": weight for name, weight in found.items()}


@functools.cache
def conditioner_weights(config: ConditionConfig, width: int, condition_width: int) -> Weights:
    """Of adapter and connector, whole. Shared between callers: not to be changed."""
    found: Weights = {}
    if config.queries:
        found["adapter.queries"] = Weight((config.queries, width))
        for name in ("query", "key", "value", "attention_out"):
            found |= _linear(f"adapter.{name}", width, width)
        found |= _linear("adapter.mlp_in", width, 4 * width) | _linear("adapter.mlp_out", 4 * width, width)
    connector = config.connector
    for i in range(connector.layers if connector.kind == "transformer" else 0):
        name = f"connector.layers.{i}"
        found |= _norm(f"{name}.attention_norm", width) | _linear(f"{name}.qkv", width, 3 * width)
        found |= _linear(f"{name}.attention_out", width, width) | _norm(f"{name}.mlp_norm", width)
        found |= _linear(f"{name}.mlp_in", width, 4 * width) | _linear(f"{name}.mlp_out", 4 * width, width)
    found |= _norm("connector.norm", width)
    if connector.kind == "mlp":
        found |= _linear("connector.hidden", width, width)
    found |= _linear("connector.out", width, condition_width)
    return {f"conditioner.{name}": weight for name, weight in found.items()}


def _norm(name: str, width: int) -> Weights:
    return {f"{name}.weight": Weight((width,)), f"{name}.bias": Weight((width,))}


def _linear(
    name: str,
    inputs: int,
    outputs: int,
    *,
    column: int = 1,
    row: int = 1,
    bias: bool = True,
    trained: bool = True,
) -> Weights:
    """A linear; `column`, `row`: over how many ranks its outputs or inputs are split."""
    found = {f"{name}.weight": Weight((outputs // column, inputs // row), trained, (column, row))}
    return found | ({f"{name}.bias": Weight((outputs // column,), trained)} if bias else {})


def _embedding(name: str, inputs: int, width: int) -> Weights:
    return _linear(f"{name}.first", inputs, width) | _linear(f"{name}.second", width, width)


def _flux(config: GeneratorConfig, tp: int, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Weight]]:
    d, doubles = config.hidden_size, config.double_blocks
    if any(chunk.first for chunk in chunks):
        yield from _linear("image_in", config.token_channels, d).items()
        yield from _linear("condition_in", config.condition_width, d).items()
        yield from _embedding("time", SINUSOIDS, d).items()
        if config.guidance_embedding:
            yield from _embedding("guidance", SINUSOIDS, d).items()
        if config.pooled_width is not None:
            yield from _embedding("pooled", config.pooled_width, d).items()
    for i in (i for chunk in chunks for i in chunk.blocks):
        if i < doubles:
            unread = config.single_blocks == 0 and i == doubles - 1
            for stream in ("condition", "image"):
                trained = not (unread and stream == "condition")
                yield from _stream(f"double_blocks.{i}.{stream}", config, tp, trained).items()
        else:
            yield from _single(f"single_blocks.{i - doubles}", config, tp).items()
    if any(chunk.last for chunk in chunks):
        yield from _linear("out_modulation.linear", d, 2 * d).items()
        yield from _linear("out", d, config.token_channels).items()


def _head_norms(name: str, config: GeneratorConfig, query_trained: bool = True) -> Weights:
    shape = (config.hidden_size // config.heads,)
    return {f"{name}.query.weight": Weight(shape, query_trained), f"{name}.key.weight": Weight(shape)}


def _stream(name: str, config: GeneratorConfig, tp: int, trained: bool) -> Weights:
    d, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    return (
        _linear(f"{name}.modulation.linear", d, 6 * d)
        | _linear(f"{name}.qkv", d, 3 * d, column=tp)
        | _head_norms(f"{name}.norm", config, trained)
        | _linear(f"{name}.attention_out", d, d, row=tp, trained=trained)
        | _linear(f"{name}.mlp.first", d, inner, column=tp, trained=trained)
        | _linear(f"{name}.mlp.second", inner, d, row=tp, trained=trained)
    )


def _single(name: str, config: GeneratorConfig, tp: int) -> Weights:
    d, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    return (
        _linear(f"{name}.modulation.linear", d, 3 * d)
        | _linear(f"{name}.qkv", d, 3 * d, column=tp)
        | _head_norms(f"{name}.norm", config)
        | _linear(f"{name}.mlp_in", d, inner, column=tp)
        | _linear(f"{name}.attention_out", d, d, row=tp, bias=False)
        | _linear(f"{name}.mlp_out", inner, d, row=tp)
    )


def _z_image(config: GeneratorConfig, tp: int, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Weight]]:
    d, channels = config.hidden_size, modulation_channels(config.hidden_size)
    if any(chunk.first for chunk in chunks):
        yield "image_pad", Weight((1, d))
        yield "condition_pad", Weight((1, d))
        yield from _linear("image_in", config.token_channels, d).items()
        yield "condition_norm.weight", Weight((config.condition_width,))
        yield from _linear("condition_in", config.condition_width, d).items()
        yield from _linear("time.first", TimeEmbedding.FREQUENCIES, TIME_HIDDEN).items()
        yield from _linear("time.second", TIME_HIDDEN, channels).items()
        for i in range(config.refiner_blocks):
            yield from _z_image_block(f"noise_refiner.{i}", config, tp, modulated=True).items()
            yield from _z_image_block(f"context_refiner.{i}", config, tp, modulated=False).items()
    for i in (i for chunk in chunks for i in chunk.blocks):
        yield from _z_image_block(f"single_blocks.{i}", config, tp, modulated=True).items()
    if any(chunk.last for chunk in chunks):
        yield from _linear("out_modulation", channels, d).items()
        yield from _linear("out", d, config.token_channels).items()


def _z_image_block(name: str, config: GeneratorConfig, tp: int, *, modulated: bool) -> Weights:
    d, inner = config.hidden_size, mlp_width(config.hidden_size)
    found = _linear(f"{name}.qkv", d, 3 * d, column=tp, bias=False) | _head_norms(f"{name}.norm", config)
    found |= _linear(f"{name}.attention_out", d, d, row=tp, bias=False)
    found |= _linear(f"{name}.mlp.gate", d, inner, column=tp, bias=False)
    found |= _linear(f"{name}.mlp.up", d, inner, column=tp, bias=False)
    found |= _linear(f"{name}.mlp.down", inner, d, row=tp, bias=False)
    if config.norm_affine:
        for norm in ("attention_norm_in", "attention_norm_out", "mlp_norm_in", "mlp_norm_out"):
            found[f"{name}.{norm}.weight"] = Weight((d,))
    return found | (_linear(f"{name}.modulation", modulation_channels(d), 4 * d) if modulated else {})


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """What a set of weights costs on one rank; optimizer and average are the mean over its ranks."""

    weights: float
    gradients: float
    optimizer: float
    ema: float


def weight_bytes(weights: Mapping[str, Weight], config: Config, replicas: int) -> WeightBytes:
    """Bytes of weights, gradients, optimizer state and average.

    bf16: weights 2, gradients 4 (summed in fp32), fp32 master 4, moments 8, average 4. fp32: 4, 4, no
    master, 8, 4. fp64: twice that of fp32. With the distributed optimizer, master, moments and average are
    spread over the `replicas` data-parallel ranks. Muon keeps one moment of a hidden matrix, not two.
    """
    size = {"bf16": 2, "fp32": 4, "fp64": 8}[config.train.precision]
    full = max(4, size)
    trained = {name: w for name, w in weights.items() if w.trained}
    numbers = sum(w.numbers for w in trained.values())
    moments = 2.0 * numbers
    if config.optimizer.kind == "muon":
        moments -= sum(w.numbers for name, w in trained.items() if is_hidden_matrix(name, w))
    master = numbers if size < full else 0
    spread = replicas if config.parallel.distributed_optimizer else 1
    return WeightBytes(
        weights=size * sum(w.numbers for w in weights.values()),
        gradients=full * numbers,
        optimizer=full * (master + moments) / spread,
        ema=0.0 if config.optimizer.ema_decay is None else full * numbers / spread,
    )


def is_hidden_matrix(name: str, weight: Weight) -> bool:
    """Whether Muon orthogonalises it (`iomm.parallel.muon`); AdamW keeps the rest."""
    return len(weight.shape) == 2 and not any(fnmatchcase(name, pattern) for pattern in ADAMW)


def newton_schulz_flops(weights: Mapping[str, Weight], steps: int) -> float:
    """What Muon's orthogonalisation costs: of X (m <= n), each step X X^T, its square and a product,
    4 m^2 n + 2 m^3. Split matrices are gathered first; a fused query-key-value matrix is three."""
    total = 0.0
    for name, weight in weights.items():
        if weight.trained and is_hidden_matrix(name, weight):
            rows, columns = (side * ranks for side, ranks in zip(weight.shape, weight.split, strict=True))
            parts = 3 if name.endswith("qkv.weight") else 1
            m, n = sorted((rows // parts, columns))
            total += parts * steps * (4.0 * m**2 * n + 2.0 * m**3)
    return total


def codec_weights(shape: CodecShape) -> int:
    """Numbers in `AutoencoderKL`, encoder and decoder."""

    def convolution(inputs: int, outputs: int, side: int = 3) -> int:
        return inputs * outputs * side * side + outputs

    def resnet(inputs: int, outputs: int) -> int:
        shortcut = convolution(inputs, outputs, 1) if inputs != outputs else 0
        both = convolution(inputs, outputs) + convolution(outputs, outputs)
        return 2 * inputs + 2 * outputs + both + shortcut

    finest, coarsest, latent = shape.channels[0], shape.channels[-1], shape.latent_channels
    middle = 2 * resnet(coarsest, coarsest)
    middle += 2 * coarsest + 4 * (coarsest * coarsest + coarsest) if shape.mid_attention else 0
    total = convolution(3, finest) + 2 * middle + 2 * coarsest + convolution(coarsest, 2 * latent)
    total += convolution(latent, coarsest) + 2 * finest + convolution(finest, 3)
    total += convolution(2 * latent, 2 * latent, 1) + convolution(latent, latent, 1) if shape.quant else 0
    down = up = 0
    for channels, resnets in ((shape.channels, shape.resnets), (shape.channels[::-1], shape.resnets + 1)):
        before = channels[0]
        for level, after in enumerate(channels):
            blocks = resnet(before, after) + (resnets - 1) * resnet(after, after)
            ends = convolution(after, after) if level < len(channels) - 1 else 0
            down, up, before = down + blocks, up + ends, after
    return total + down + up
