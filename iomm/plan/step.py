"""Seconds of one optimizer step in one layout.

What overlaps, and what is taken to cost nothing:
    gradients travel behind the backward pass of the last micro-batch; only what is longer counts
    interleaved chunks send to each other behind other chunks; plain 1F1B waits
    tensor-parallel traffic and the gather of stepped weights are waited for
    decoding of images, saving and evaluation are left out, and so is the latency of messages
A pipeline of m micro-batches takes m + (pp - 1) / virtual stages times its slowest stage.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from iomm.config import GeneratorConfig, ParallelConfig
from iomm.model.flops import block_costs, first_cost, last_cost
from iomm.parallel.stages import Chunk, chunks_of, split, whole
from iomm.plan import communication
from iomm.plan.calibration import Efficiency, seconds_of
from iomm.plan.communication import Transfer
from iomm.plan.costs import Item, condition_items, generator_moved, image_items
from iomm.plan.hardware import Cluster
from iomm.plan.memory import Memory, rank_memory
from iomm.plan.weights import Weights, conditioner_weights, generator_weights, newton_schulz_flops
from iomm.plan.workload import Workload

# Families of operators whose tensors tensor parallelism splits by heads or MLP channels.
SPLIT = ("query and key norm, rope", "joint sequence", "gelu", "swiglu")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One layout of one workload on one cluster."""

    work: Workload
    cluster: Cluster
    replicas: int  # data-parallel ranks
    micro_batches: int  # of a step, on each of them
    parts: dict[str, float]  # seconds of a step on the slowest stage, in order; they add up
    items: list[tuple[Item, float]]  # of one image, with seconds on one GPU
    transfers: list[Transfer]
    memory: list[Memory]  # of each pipeline stage

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def images_per_s(self) -> float:
        """Of one GPU."""
        return self.work.config.train.global_batch_images / self.seconds / self.cluster.gpus

    @property
    def flops(self) -> float:
        """Useful FLOPs of one image."""
        return sum(item.flops for item, _ in self.items if not item.again)

    @property
    def mfu(self) -> float:
        """Useful FLOP/s over the bf16 peak."""
        return self.images_per_s * self.flops / self.cluster.gpu.bf16_flops

    @property
    def peak_bytes(self) -> float:
        return max(memory.peak for memory in self.memory)

    @property
    def fits(self) -> bool:
        gpu = self.cluster.gpu
        return self.peak_bytes <= gpu.memory_bytes - gpu.reserve_bytes


def stages_of(work: Workload) -> list[tuple[Chunk, ...]]:
    """Every pipeline stage's chunks, as a run deals them (`iomm.system.plan_stages`).

    Raises:
        ValueError: more chunks than blocks.
    """
    config, parallel = work.config.generator, work.config.parallel
    if parallel.pp == 1:
        return [(whole(config.double_blocks + config.single_blocks),)]
    size, flops = work.config.train.micro_batch_images, 0.0
    if parallel.encoders == "first_stage":
        # What is trained, and a third of it, because the blocks' costs are those of their forward passes.
        trained = [i for i in condition_items(work, size) if i.name != "LM prefix"]
        flops = sum(i.flops for i in trained) / 3
    tokens = work.image_tokens, math.ceil(work.condition_tokens(size))
    return _deal(config, tokens, parallel.pp, parallel.virtual_stages, flops)


@functools.cache
def _deal(
    config: GeneratorConfig, tokens: tuple[int, int], pp: int, virtual_stages: int, condition_flops: float
) -> list[tuple[Chunk, ...]]:
    first = first_cost(config, *tokens) + condition_flops
    last = last_cost(config, *tokens)
    ranges = split(block_costs(config, *tokens), pp * virtual_stages, first_cost=first, last_cost=last)
    return [chunks_of(ranges, rank, pp) for rank in range(pp)]


def item_seconds(item: Item, cluster: Cluster, efficiency: Efficiency) -> float:
    """On one GPU, unsplit."""
    return seconds_of(
        cluster.gpu,
        efficiency,
        gemm=item.gemm,
        gemm_fp8=item.gemm_fp8,
        attention=item.attention,
        attention_backward=item.attention_backward,
        convolution=item.convolution,
        moved=item.moved,
    )


def estimate(work: Workload, cluster: Cluster, efficiency: Efficiency) -> Estimate:
    """The estimate of `work.config.parallel`.

    Raises:
        ValueError: ranks, batches, heads or blocks that do not divide.
    """
    parallel, size = work.config.parallel, work.config.train.micro_batch_images
    replicas, micro_batches = check_layout(work, cluster)
    stages = stages_of(work)
    items = [(i, item_seconds(i, cluster, efficiency)) for i in image_items(work, size)]
    moved_share = _moved_share(work)
    ranks_own = [replace(i, moved=i.moved * moved_share) for i, _ in items if i.where == "generator"]
    generator = size * sum(item_seconds(i, cluster, efficiency) for i in ranks_own) / parallel.tp
    condition = size * sum(s for i, s in items if i.where == "conditioner")
    encoders = size * sum(s for i, s in items if i.where == "encoders")
    shared = parallel.encoders == "shared" and parallel.tp * parallel.pp > 1
    share, slowest = _slowest(work, stages, generator, 0.0 if shared else condition + encoders)
    times = micro_batches if not shared else math.ceil(micro_batches / (parallel.tp * parallel.pp))
    trained = [_trained(work, chunks, shared) for chunks in stages]
    here = trained[share.stage]
    parts = {
        "generator": micro_batches * share.generator,
        "condition (adapter, LM, connector)": times * condition if shared or share.first else 0.0,
        "frozen encoders (autoencoder, ViT)": times * encoders if shared or share.first else 0.0,
        "pipeline bubble": (parallel.pp - 1) / parallel.virtual_stages * slowest,
        "gradient accumulation": micro_batches * _accumulation(here, work, cluster, efficiency),
        "clip, optimizer, average": _optimizer(here, work, replicas, cluster, efficiency),
    }
    transfers = _transfers(work, cluster, stages[share.stage], here, replicas, micro_batches, shared)
    behind = 2 / 3 * slowest
    parts["communication waited for"] = sum(_waited(t, behind) for t in transfers)
    return Estimate(
        work=work,
        cluster=cluster,
        replicas=replicas,
        micro_batches=micro_batches,
        parts=parts,
        items=items,
        transfers=transfers,
        memory=[rank_memory(work, i, chunks, replicas, micro_batches) for i, chunks in enumerate(stages)],
    )


def check_layout(work: Workload, cluster: Cluster) -> tuple[int, int]:
    """Data-parallel ranks, and micro-batches of a step on each.

    Raises:
        ValueError: something does not divide; the message says what.
    """
    config, parallel = work.config, work.config.parallel
    ranks, heads = parallel.tp * parallel.pp, config.generator.heads
    if cluster.gpus % ranks:
        raise ValueError(f"{cluster.gpus} GPUs are not divisible by tp*pp = {parallel.tp}*{parallel.pp}.")
    if heads % parallel.tp:
        raise ValueError(f"generator.heads {heads} is not divisible by parallel.tp {parallel.tp}.")
    if parallel.tp > cluster.node_gpus:
        raise ValueError(f"parallel.tp {parallel.tp} exceeds the {cluster.node_gpus} GPUs of a node.")
    if parallel.sequence_parallel and work.image_tokens % parallel.tp:
        raise ValueError(f"{work.image_tokens} image tokens are not divisible by parallel.tp {parallel.tp}.")
    replicas = cluster.gpus // ranks
    batch, size = config.train.global_batch_images, config.train.micro_batch_images
    if batch % (replicas * size):
        raise ValueError(
            f"global batch {batch} is not divisible by data-parallel ranks x micro-batch = "
            f"{replicas} x {size}."
        )
    micro_batches = batch // (replicas * size)
    if parallel.virtual_stages > 1 and micro_batches % parallel.pp:
        raise ValueError(
            f"interleaving needs micro-batches ({micro_batches}) in multiples of parallel.pp {parallel.pp}."
        )
    return replicas, micro_batches


@dataclass(frozen=True)
class _Share:
    """The slowest stage: its number, whether it is the first, its generator's seconds for a micro-batch."""

    stage: int
    first: bool
    generator: float


def _slowest(
    work: Workload, stages: Sequence[tuple[Chunk, ...]], generator: float, first_extra: float
) -> tuple[_Share, float]:
    """The slowest stage, and its seconds for a micro-batch."""
    config = work.config.generator
    tokens = work.image_tokens, round(work.condition_tokens(work.config.train.micro_batch_images))
    costs, first, last = block_costs(config, *tokens), first_cost(config, *tokens), last_cost(config, *tokens)
    total = sum(costs) + first + last
    found = []
    for number, chunks in enumerate(stages):
        cost = sum(costs[i] for chunk in chunks for i in chunk.blocks)
        cost += sum((first if c.first else 0) + (last if c.last else 0) for c in chunks)
        is_first = any(chunk.first for chunk in chunks)
        seconds = generator * cost / total
        found.append((seconds + (first_extra if is_first else 0.0), _Share(number, is_first, seconds)))
    slowest, share = max(found, key=lambda pair: pair[0])
    return share, slowest


def _moved_share(work: Workload) -> float:
    """Bytes of the generator's memory-bound operators on a tensor-parallel rank times tp, over all."""
    parallel = work.config.parallel
    tokens = round(work.condition_tokens(work.config.train.micro_batch_images))
    moved = generator_moved(work, tokens, lambda p: p.forward(work.fused) + p.backward(work.fused))
    if parallel.sequence_parallel or parallel.tp == 1:
        return 1.0
    split = sum(size for name, size in moved.items() if name in SPLIT)
    return (split + parallel.tp * (sum(moved.values()) - split)) / sum(moved.values())


def _trained(work: Workload, chunks: tuple[Chunk, ...], shared: bool) -> dict[str, Weights]:
    """A rank's weights: "generator", and "conditioner" where there is one."""
    config = work.config
    found = {"generator": generator_weights(config.generator, config.parallel.tp, chunks)}
    if shared or any(chunk.first for chunk in chunks):
        width = work.mllm.lm.width
        found["conditioner"] = conditioner_weights(config.condition, width, config.generator.condition_width)
    return found


def _numbers(weights: Weights) -> int:
    return sum(w.numbers for w in weights.values() if w.trained)


def _accumulation(
    here: dict[str, Weights], work: Workload, cluster: Cluster, efficiency: Efficiency
) -> float:
    """A gradient is written in the compute precision, and read again with its fp32 sum, which is written."""
    size = 2 * work.element_bytes + 2 * max(4, work.element_bytes)
    return seconds_of(cluster.gpu, efficiency, moved=float(size * sum(_numbers(w) for w in here.values())))


def _optimizer(
    here: dict[str, Weights], work: Workload, replicas: int, cluster: Cluster, efficiency: Efficiency
) -> float:
    """Zeroed and clipped gradients, their norm (16 bytes a weight); on its owner AdamW (30) and the average
    (12). Muon's orthogonalisation, dealt to the data-parallel ranks, in matrix products."""
    config = work.config
    numbers = sum(_numbers(w) for w in here.values())
    spread = replicas if config.parallel.distributed_optimizer else 1
    step = 30 + (12 if config.optimizer.ema_decay is not None else 0)
    flops = 0.0
    if config.optimizer.kind == "muon":
        steps = config.optimizer.muon_newton_schulz_steps
        flops = sum(newton_schulz_flops(w, steps) for w in here.values()) / spread
    return seconds_of(cluster.gpu, efficiency, gemm=flops, moved=numbers * (16 + step / spread))


def _transfers(
    work: Workload,
    cluster: Cluster,
    chunks: tuple[Chunk, ...],
    here: dict[str, Weights],
    replicas: int,
    micro_batches: int,
    shared: bool,
) -> list[Transfer]:
    parallel: ParallelConfig = work.config.parallel
    found: list[Transfer] = []
    if parallel.tp > 1:
        blocks = sum(len(chunk.blocks) for chunk in chunks)
        # A noise and a context refiner together see the tokens of one block.
        blocks += work.config.generator.refiner_blocks if any(chunk.first for chunk in chunks) else 0
        found.append(communication.tensor_parallel(work, cluster, blocks, micro_batches))
    if parallel.pp > 1:
        found.append(communication.pipeline(work, cluster, replicas, micro_batches))
    for what, weights in here.items():
        of_world = shared and what == "conditioner"
        ranks, stride = (cluster.gpus, 1) if of_world else (replicas, parallel.tp)
        if ranks > 1:
            name = "shared conditioner" if of_world else what
            found += communication.data_parallel(work, cluster, weights, ranks, stride, name)
    if shared:
        found.append(communication.encoder_routing(work, cluster, replicas, micro_batches))
    return found


def _waited(transfer: Transfer, backward_seconds: float) -> float:
    if transfer.hidden_behind is None:
        return transfer.seconds
    return max(0.0, transfer.seconds - backward_seconds)
