"""What goes over the wires in a step, of one rank, and how long it takes.

Rings: an all-reduce of V bytes over n ranks moves 2 (n - 1) / n V through each rank, a reduce-scatter or an
all-gather half of that. Ranks are laid out tp x dp x pp, tensor-parallel ranks next to each other, so a group
has `stride` ranks between its members. A group that spans nodes shares their network cards with nobody: as
many cards of a node as it has members there. Latency of messages is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from iomm.model.padding import padded
from iomm.plan.hardware import Cluster
from iomm.plan.weights import Weight
from iomm.plan.workload import Workload

# Of the wires' rate that collectives reach. NVLink: DeepEP's authors (github.com/deepseek-ai/DeepEP) call 160
# of an H800's 200 GB/s its maximum. Network: an assumption.
NVLINK_EFFICIENCY, NETWORK_EFFICIENCY = 0.8, 0.8


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of traffic in a step."""

    name: str
    bytes: float  # sent by a rank
    seconds: float
    hidden_behind: str | None = None  # what runs meanwhile; None: the step waits


def bus(cluster: Cluster, ranks: int, stride: int) -> float:
    """Bytes/s through each rank of a ring over ranks `stride` apart."""
    in_node = max(1, min(ranks, cluster.node_gpus // stride))
    nvlink = cluster.gpu.nvlink * NVLINK_EFFICIENCY
    if ranks <= in_node:
        return nvlink
    network = cluster.network * NETWORK_EFFICIENCY * in_node
    return min(nvlink, network) if in_node > 1 else network


def ring(size: float, ranks: int) -> float:
    """Bytes through a rank when `size` bytes are gathered or scattered over a ring."""
    return size * (ranks - 1) / ranks


def tensor_parallel(work: Workload, cluster: Cluster, blocks: int, micro_batches: int) -> Transfer:
    """All-reduces behind row-parallel linears, and of the input gradients of column-parallel ones; with
    sequence parallelism gathers and scatters, and the inputs gathered again for the weights' gradients."""
    parallel, config, size = work.config.parallel, work.config.generator, work.config.train.micro_batch_images
    columns = 3 if config.family == "z_image" else 2  # linears a block that read the same stream, per stream
    tokens = work.image_tokens + work.condition_tokens(size)
    if config.family == "z_image":
        tokens = padded(work.image_tokens) + padded(round(work.condition_tokens(size)))
    volume = ring(tokens * size * config.hidden_size * work.element_bytes, parallel.tp)
    if parallel.sequence_parallel:
        forward, backward = columns + 2, 2 * columns + 2
    else:
        forward, backward = 2 * 2, 2 * columns
    forward *= 2 if parallel.recompute != "none" else 1
    total = micro_batches * blocks * (forward + backward) * volume
    how = "gather and scatter" if parallel.sequence_parallel else "all-reduce"
    return Transfer(name=f"tensor parallel: {how}", bytes=total, seconds=total / bus(cluster, parallel.tp, 1))


def pipeline(work: Workload, cluster: Cluster, replicas: int, micro_batches: int) -> Transfer:
    """Packed activations to the next stage and their gradients back. Nothing hides them: with shapes that
    may change from step to step (`variable_seq_lengths`) Megatron waits for each message."""
    parallel, config, size = work.config.parallel, work.config.generator, work.config.train.micro_batch_images
    rows = (1 + work.image_tokens + work.condition_tokens(size)) * size
    packed = rows * config.hidden_size * work.element_bytes
    packed /= parallel.tp if parallel.sequence_parallel else 1
    total = 2 * micro_batches * parallel.virtual_stages * packed
    return Transfer(
        name="pipeline: activations and their gradients",
        bytes=total,
        seconds=total / bus(cluster, 2, parallel.tp * replicas),
    )


def data_parallel(
    work: Workload, cluster: Cluster, weights: Mapping[str, Weight], ranks: int, stride: int, what: str
) -> list[Transfer]:
    """Gradients summed over replicas, and with the distributed optimizer the stepped weights gathered.

    Gradients travel while the last micro-batch's backward pass runs; the gather follows the step, and the
    next step waits for it.
    """
    numbers = sum(w.numbers for w in weights.values() if w.trained)
    gradient = numbers * max(4, work.element_bytes)
    rate = bus(cluster, ranks, stride)
    behind = None if what == "shared conditioner" else "backward of the last micro-batch"

    def transfer(name: str, size: float, hidden_behind: str | None) -> Transfer:
        return Transfer(name=name, bytes=size, seconds=size / rate, hidden_behind=hidden_behind)

    if not work.config.parallel.distributed_optimizer:
        return [transfer(f"data parallel, {what}: all-reduce gradients", 2 * ring(gradient, ranks), behind)]
    gathered = ring(numbers * work.element_bytes, ranks)
    return [
        transfer(f"data parallel, {what}: reduce-scatter gradients", ring(gradient, ranks), behind),
        transfer(f"data parallel, {what}: all-gather weights", gathered, None),
    ]


def encoder_routing(work: Workload, cluster: Cluster, replicas: int, micro_batches: int) -> Transfer:
    """Shared encoders: conditions to the first stage and their gradients back, latents to the last stage."""
    parallel, size = work.config.parallel, work.config.train.micro_batch_images
    config = work.config.generator
    condition = work.condition_tokens(size) * config.condition_width * work.element_bytes
    latent = work.image_tokens * config.token_channels * 4.0
    total = micro_batches * size * (2 * condition + latent)
    stride = 1 if parallel.pp == 1 else parallel.tp * replicas
    ranks = parallel.tp * parallel.pp
    return Transfer(
        name="encoders: conditions and their gradients",
        bytes=total,
        seconds=total / bus(cluster, ranks, stride),
    )
