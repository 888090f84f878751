"""What a rank holds, in bytes, item by item.

Activations are what autograd saves. In a block of the generator they are counted in passes over (rows x D):
whole ones (sequence parallelism spreads them over the tensor-parallel ranks) and split ones (heads and MLP
channels, always spread). tests/plan/test_memory.py counts the saved tensors of real blocks.
"""

import math
from dataclasses import asdict, dataclass

from iomm.config import GeneratorConfig, ParallelConfig
from iomm.model.blocks_z_image import mlp_width
from iomm.model.padding import padded
from iomm.parallel.stages import Chunk
from iomm.plan.weights import codec_weights, conditioner_weights, generator_weights, weight_bytes
from iomm.plan.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one block keeps for its backward pass, in passes over (rows x D)."""

    whole: float
    split: float

    def passes(self, parallel: ParallelConfig) -> float:
        """Per rank."""
        whole = self.whole / parallel.tp if parallel.sequence_parallel else self.whole
        return whole + self.split / parallel.tp


def double_block(mlp_ratio: float, *, fused: bool, head_norm_in_fp32: bool = False) -> Saved:
    """FLUX's double block. Whole: input, [normalised,] modulated, attention's projection, twice.

    Args:
        fused: our modulation keeps its input only.
        head_norm_in_fp32: torch without its fused RMSNorm (on a CPU) saves fp32 copies of queries and keys,
            and needs the projection that they were made from no more.
    """
    head_norm = 8 if head_norm_in_fp32 else 3
    return Saved(whole=6 if fused else 8, split=head_norm + 3 + 1 + 2 * mlp_ratio)


def single_block(mlp_ratio: float, *, fused: bool, head_norm_in_fp32: bool = False) -> Saved:
    """FLUX's single block."""
    head_norm = 8 if head_norm_in_fp32 else 0  # the values keep the fused projection alive either way
    return Saved(whole=3 if fused else 4, split=head_norm + 3 + 2 + 1 + 2 * mlp_ratio)


def z_image_block(mlp_share: float, *, modulated: bool, norms_in_fp32: bool = False) -> Saved:
    """Z-Image's block; `mlp_share`: inner channels of the SwiGLU over D. Norms as in `double_block`."""
    if norms_in_fp32:
        return Saved(whole=22 if modulated else 18, split=8 + 6 + 4 * mlp_share)
    return Saved(whole=10 if modulated else 6, split=6 + 4 * mlp_share)


def block_activations(work: Workload, micro_batch: int) -> list[float]:
    """Bytes that each pipelined block keeps of one micro-batch on a rank, by number."""
    config, parallel = work.config.generator, work.config.parallel
    tokens = math.ceil(work.condition_tokens(micro_batch))
    rows = (work.image_tokens + tokens) * micro_batch
    if config.family == "z_image":
        rows = (padded(work.image_tokens) + padded(tokens)) * micro_batch
    unit = rows * config.hidden_size * work.element_bytes
    return [unit * _kept(kind, config, parallel) for kind in _kinds(config, work.fused)]


def refiner_activations(work: Workload, micro_batch: int) -> float:
    """Bytes that Z-Image's refiners, which belong to the first chunk, keep of one micro-batch: noise refiners
    of the image's rows, context refiners of the condition's."""
    config, parallel = work.config.generator, work.config.parallel
    if config.refiner_blocks == 0:
        return 0.0
    share = mlp_width(config.hidden_size) / config.hidden_size
    streams = (
        (padded(work.image_tokens), True),
        (padded(math.ceil(work.condition_tokens(micro_batch))), False),
    )
    passes = sum(
        tokens * _kept(z_image_block(share, modulated=modulated), config, parallel)
        for tokens, modulated in streams
    )
    return config.refiner_blocks * micro_batch * config.hidden_size * work.element_bytes * passes


def _kept(kind: Saved, config: GeneratorConfig, parallel: ParallelConfig) -> float:
    """Passes that a block keeps on a rank, with what is recomputed left out."""
    if parallel.recompute == "full":
        return 1.0 / (parallel.tp if parallel.sequence_parallel else 1)
    return (_selective(config) if parallel.recompute == "selective" else kind).passes(parallel)


def _kinds(config: GeneratorConfig, fused: bool) -> list[Saved]:
    if config.family == "z_image":
        share = mlp_width(config.hidden_size) / config.hidden_size
        return [z_image_block(share, modulated=True)] * config.single_blocks
    doubles = [double_block(config.mlp_ratio, fused=fused)] * config.double_blocks
    return doubles + [single_block(config.mlp_ratio, fused=fused)] * config.single_blocks


def _selective(config: GeneratorConfig) -> Saved:
    """Block inputs, and results of matrix products and attention."""
    if config.family == "z_image":
        share = mlp_width(config.hidden_size) / config.hidden_size
        return Saved(whole=1 + 2, split=3 + 1 + 2 * share)
    return Saved(whole=1 + 2, split=3 + 1 + config.mlp_ratio)


def condition_activations(work: Workload, micro_batch: int) -> float:
    """Bytes of one micro-batch's way through adapter, LM and connector, with the prefix's keys and values.

    A layer of the transformers library's Qwen2 keeps, for each row that carries gradients: three MLP tensors,
    two fp32 norms, queries and attention; and keys and values of all positions.
    """
    lm, config = work.mllm.lm, work.config.condition
    p, q, unit = work.prefix_tokens(micro_batch), work.queries, work.mllm.lm.width * work.element_bytes
    rows = (q if config.prefix_split else p + q) if q else 0
    layer = rows * (3 * lm.mlp / lm.width + 4 + 2) + 3 * lm.kv_width / lm.width * (p + q)
    adapter = 13 * q + 3 * p if q else 0
    layers = config.connector.layers if config.connector.kind == "transformer" else 1
    connector = (16 * layers + 2) * work.condition_tokens(micro_batch)
    return micro_batch * unit * (lm.layers * layer + adapter + connector)


def encoder_weights(work: Workload) -> float:
    """Bytes of the frozen MLLM (its unused head included) and of the autoencoder in fp32."""
    return work.mllm.weights * work.element_bytes + codec_weights(work.codec) * max(4, work.element_bytes)


def encoder_workspace(work: Workload, micro_batch: int) -> float:
    """Bytes while the autoencoder encodes: about three tensors of its finest level, in fp32."""
    if "vae" in work.cached:
        return 0.0
    return 3.0 * micro_batch * work.config.data.image_px**2 * work.codec.channels[0] * 4


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a rank holds at once, in units of all its chunks.

    1F1B: the distance to the last stage, and its own. Interleaved: Megatron's warm-up of chunk passes.
    """
    if parallel.virtual_stages == 1:
        return min(micro_batches, parallel.pp - stage)
    warm_up = 2 * (parallel.pp - stage - 1) + (parallel.virtual_stages - 1) * parallel.pp
    return min(micro_batches * parallel.virtual_stages, warm_up + 1) / parallel.virtual_stages


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one rank, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    encoders: float
    activations: float  # of the generator's blocks, of all micro-batches in flight
    condition: float  # of adapter, LM and connector
    workspace: float  # gradients of a block's activations, or what the autoencoder needs while it encodes

    @property
    def peak(self) -> float:
        """Everything, with what is never there at the same time counted once."""
        return sum(asdict(self).values())


def rank_memory(
    work: Workload, stage: int, chunks: tuple[Chunk, ...], replicas: int, micro_batches: int
) -> Memory:
    """Of a rank of pipeline stage `stage`.

    Args:
        chunks: the stage's.
        replicas: data-parallel ranks.
        micro_batches: of a step, on each data-parallel rank.
    """
    config, parallel, size = work.config, work.config.parallel, work.config.train.micro_batch_images
    shared = parallel.encoders == "shared" and parallel.tp * parallel.pp > 1
    generator = generator_weights(config.generator, parallel.tp, chunks)
    parts = [weight_bytes(generator, config, replicas)]
    first = any(chunk.first for chunk in chunks)
    if shared or first:
        width, out = work.mllm.lm.width, config.generator.condition_width
        world = replicas * parallel.tp * parallel.pp
        weights = conditioner_weights(config.condition, width, out)
        parts.append(weight_bytes(weights, config, world if shared else replicas))
    of_block = block_activations(work, size)
    held = in_flight(parallel, stage, micro_batches)
    blocks = sum(of_block[i] for chunk in chunks for i in chunk.blocks)
    blocks += refiner_activations(work, size) if first else 0.0
    unit = (work.image_tokens + work.condition_tokens(size)) * size * config.generator.hidden_size
    recomputed = _full_block(work, size) if parallel.recompute != "none" else 0.0
    backward = 10.0 * unit * work.element_bytes / parallel.tp + recomputed
    condition = encoding = 0.0
    if shared or first:
        # Shared, a rank's conditions of the whole step are there before the pipeline starts.
        at_once = math.ceil(micro_batches / (parallel.tp * parallel.pp)) if shared else held
        condition = at_once * condition_activations(work, size)
        encoding = encoder_workspace(work, size)
    alive_while_encoding = max(held - 1, 0) * blocks + (condition if held > 1 else 0.0)
    busiest = max(held * blocks + condition + backward, alive_while_encoding + encoding)
    return Memory(
        weights=sum(p.weights for p in parts),
        gradients=sum(p.gradients for p in parts),
        optimizer=sum(p.optimizer for p in parts),
        ema=sum(p.ema for p in parts),
        encoders=encoder_weights(work) if shared or first else 0.0,
        activations=held * blocks,
        condition=condition,
        workspace=busiest - held * blocks - condition,
    )


def _full_block(work: Workload, micro_batch: int) -> float:
    """Bytes of the most expensive block while it is recomputed."""
    config, parallel = work.config.generator, work.config.parallel
    rows = (work.image_tokens + work.condition_tokens(micro_batch)) * micro_batch
    most = max(kind.passes(parallel) for kind in _kinds(config, work.fused))
    return rows * config.hidden_size * work.element_bytes * most
