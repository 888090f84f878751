"""Accelerators and how they are wired, from their data sheets. FLOP/s are dense, without sparsity."""

import dataclasses
from dataclasses import dataclass

from iomm.evaluation.peaks import PEAK_BF16_FLOPS

GIB = 2**30
NODE_GPUS = 8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator. H800: an H100 of which NVLink is cut from 900 to 400 GB/s (both directions)."""

    name: str
    bf16_flops: float
    fp8_flops: float
    tf32_flops: float
    memory_bytes: float
    bandwidth: float  # of its memory, bytes/s
    nvlink: float  # bytes/s in one direction
    reserve_bytes: float = 4e9  # CUDA context, NCCL buffers, fragments of the allocator (an assumption)

    def __post_init__(self) -> None:
        assert min(self.bf16_flops, self.memory_bytes, self.bandwidth, self.nvlink) > 0


_H100 = Gpu(
    name="h100",
    bf16_flops=PEAK_BF16_FLOPS["NVIDIA H100 80GB HBM3"],
    fp8_flops=1979e12,
    tf32_flops=494.5e12,
    memory_bytes=80 * GIB,
    bandwidth=3.35e12,
    nvlink=450e9,
)
GPUS = {
    gpu.name: gpu
    for gpu in (
        _H100,
        dataclasses.replace(_H100, name="h800", nvlink=200e9),
        dataclasses.replace(_H100, name="h200", memory_bytes=141e9, bandwidth=4.8e12),
    )
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of eight accelerators each, joined by a network."""

    gpu: Gpu
    gpus: int
    node_gpus: int = NODE_GPUS
    network_gbit: float = 3200.0  # of one node, Gbit/s: eight cards of 400

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.node_gpus < 1 or self.network_gbit <= 0:
            raise ValueError(
                f"{self.gpus} GPUs, {self.node_gpus} a node, {self.network_gbit} Gbit/s a node: all must be "
                "positive. Change --gpus or --network-gbit."
            )
        if self.gpus > self.node_gpus and self.gpus % self.node_gpus:
            raise ValueError(
                f"{self.gpus} GPUs do not fill nodes of {self.node_gpus}. Give --gpus as a multiple of "
                f"{self.node_gpus}, or at most {self.node_gpus}."
            )

    @property
    def network(self) -> float:
        """Bytes/s of one accelerator's network card."""
        return self.network_gbit / 8 * 1e9 / self.node_gpus


def find_gpu(name: str) -> Gpu:
    """The accelerator of that name.

    Raises:
        ValueError: an unknown one.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"unknown GPU {name!r}. Known: {', '.join(sorted(GPUS))}.")
    return GPUS[name.lower()]
