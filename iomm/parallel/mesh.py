"""The mesh of ranks, and the only file that touches Megatron's global state.

Every other module gets its process groups as an argument: `mesh.groups` (Megatron's `ProcessGroupCollection`:
`tp`, `pp`, `dp`, `dp_cp`, ...). A world is laid out as tp x dp x pp, tensor-parallel ranks next to each
other.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from iomm.config import ParallelConfig
from iomm.parallel import cpu

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# Megatron's generators serve dropout and Megatron's own initialisation, of which iomm has none (iomm.random,
# and weights initialised by name), so the seed has no influence on a run.
_MEGATRON_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this process stands, and what the ranks say to each other."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    groups: "ProcessGroupCollection"
    device: torch.device

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank. It travels pickled, between ranks of one job only."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` on every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def mean_over_dp(self, tensor: Tensor) -> Tensor:
        """Mean over the data-parallel ranks of a tensor of any shape, in its own dtype; the argument is left
        alone."""
        if self.dp_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.groups.dp)
        return total / self.dp_size

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is True on at least one rank."""
        if self.world_size == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        return bool(count.item())


_current: tuple[ParallelConfig, Mesh] | None = None
_left_torchrun = False


def start(parallel: ParallelConfig) -> Mesh:
    """Join the ranks that torchrun started, or be the only rank when it did not, and lay them out.

    A single process opens no port: its rendezvous is in memory. Called again with the same tp and pp it
    returns the same mesh.

    Raises:
        ValueError: pp > 1, a world size that tp * pp does not divide, another layout than the one already
            started, or a second start under torchrun after `stop`.
    """
    global _current
    if _current is not None:
        _refuse_other_layout(parallel, _current[0])
        return _current[1]
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    _check_layout(parallel, world_size)
    if _left_torchrun:
        raise ValueError(
            "this process has left torchrun's mesh and cannot join again. Launch the ranks again."
        )
    cpu.prepare()
    device = _join()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(parallel.tp, parallel.pp)
    model_parallel_cuda_manual_seed(_MEGATRON_SEED)
    mesh = Mesh(
        rank=dist.get_rank(),
        world_size=world_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        device=device,
    )
    _current = (parallel, mesh)
    return mesh


def stop() -> None:
    """Leave the mesh, so that `start` may lay out another one. Does nothing if none was started.

    Under torchrun a process can join only once (its store remembers the first rendezvous): there `stop` is
    for the end.
    """
    global _current, _left_torchrun
    if _current is None:
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    _current, _left_torchrun = None, "RANK" in os.environ


def _check_layout(parallel: ParallelConfig, world_size: int) -> None:
    if parallel.pp > 1:
        raise ValueError(
            f"parallel.pp = {parallel.pp}, but pipeline parallelism is not available yet. "
            "Set parallel.pp=1, and parallel.tp to split a large model."
        )
    ranks = parallel.tp * parallel.pp
    if parallel.tp < 1 or parallel.pp < 1 or world_size % ranks:
        raise ValueError(
            f"world size {world_size} is not divisible by tp*pp = {parallel.tp}*{parallel.pp} = {ranks}. "
            f"Lower parallel.tp or parallel.pp (both at least 1), or launch a "
            f"multiple of {max(ranks, 1)} ranks."
        )


def _refuse_other_layout(wanted: ParallelConfig, running: ParallelConfig) -> None:
    if (wanted.tp, wanted.pp) != (running.tp, running.pp):
        raise ValueError(
            f"a mesh with tp = {running.tp}, pp = {running.pp} is running in this process; tp = {wanted.tp}, "
            f"pp = {wanted.pp} was asked for. Call iomm.parallel.mesh.stop() first."
        )


def _join() -> torch.device:
    """Start the default process group; the device this rank computes on."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if has_gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device if has_gpu else None)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return device
