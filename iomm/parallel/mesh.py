"""The mesh of ranks, and the only file that touches Megatron's global state.

Every other module gets its process groups as an argument: `mesh.groups` (Megatron's `ProcessGroupCollection`:
`tp`, `pp`, `mp` = tp x pp, `dp`, `dp_cp`, ...). A world is laid out as tp x dp x pp, tensor-parallel ranks
next to each other: rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank.
"""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from iomm.config import ParallelConfig
from iomm.parallel import cpu
from iomm.parallel.launch_id import agree_on_launch

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# Megatron's generators serve dropout and Megatron's own initialisation, of which iomm has none (iomm.random,
# and weights initialised by name), so the seed has no influence on a run.
_MEGATRON_SEED = 1
_PATIENCE = datetime.timedelta(minutes=10)  # of ranks that wait for others to start


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this process stands, and what the ranks say to each other."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    virtual_stages: int  # chunks of the model a pipeline rank holds
    groups: "ProcessGroupCollection"
    alone: (
        "ProcessGroupCollection"  # of this rank only; its dp groups are the world. For weights that all share
    )
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the pipeline's first chunk."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the pipeline's last chunk, which computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def mp_rank(self) -> int:
        """This rank's place among the tp * pp ranks that hold one copy of the model."""
        return self.groups.mp.rank()

    @property
    def mp_size(self) -> int:
        """How many ranks hold one copy of the model."""
        return self.tp_size * self.pp_size

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

    def object_from_stage(self, value: Any, stage: int) -> Any:
        """The value of pipeline stage `stage` on every stage. It travels pickled, between ranks of one job
        only."""
        if self.pp_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.groups.pp, group_src=stage, device=self.device)
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
        return bool(self.largest(flag))

    def largest(self, number: int) -> int:
        """The largest `number` of all ranks; exact up to 2^24."""
        if self.world_size == 1:
            return int(number)
        largest = torch.tensor(float(number), device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())


_current: tuple[ParallelConfig, Mesh] | None = None
# torchrun's key-value store, opened once, and how often its ranks met there.
_store: Store | None = None
_meetings = 0


def start(parallel: ParallelConfig) -> Mesh:
    """Join the ranks that torchrun started, or be the only rank when it did not, and lay them out.

    A single process opens no port: its rendezvous is in memory. Called again with the same tp, pp and
    virtual stages it returns the same mesh.

    Raises:
        ValueError: a world size that tp * pp does not divide, or another layout than the one already started.
    """
    global _current
    if _current is not None:
        _refuse_other_layout(parallel, _current[0])
        return _current[1]
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    _check_layout(parallel, world_size)
    cpu.prepare()
    device = _join()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    virtual = parallel.virtual_stages if parallel.virtual_stages > 1 else None
    parallel_state.initialize_model_parallel(parallel.tp, parallel.pp, virtual)
    model_parallel_cuda_manual_seed(_MEGATRON_SEED)
    mesh = Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp,
        virtual_stages=parallel.virtual_stages,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        alone=_groups_of_one(ProcessGroupCollection()),
        device=device,
    )
    _current = (parallel, mesh)
    return mesh


def agree(mine: str, judge: Callable[[list[str]], str], wait_s: float = 600.0) -> str:
    """What rank 0 says to everybody's texts, before there are process groups; all ranks call.

    Nothing but torchrun's store is used, so it works where the ranks would not come together: with other
    versions, or some with a GPU and some without.

    Args:
        mine: this rank's text.
        judge: called on rank 0, with the texts in the order of ranks.
        wait_s: how long rank 0 waits for them.
    Raises:
        TimeoutError: names the ranks that did not come.
    """
    if "RANK" not in os.environ:
        return judge([mine])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return ask_rank_0(_meeting_place(), rank, world_size, mine, judge, wait_s)


def ask_rank_0(
    store: Store, rank: int, world_size: int, mine: str, judge: Callable[[list[str]], str], wait_s: float
) -> str:
    """`agree` over a store in which nothing is written yet."""
    patience = datetime.timedelta(seconds=wait_s)
    store.set(f"text_{rank}", mine)
    if rank == 0:
        _wait_for(store, [f"text_{r}" for r in range(world_size)], patience)
        store.set("answer", judge([store.get(f"text_{r}").decode() for r in range(world_size)]))
    store.wait(["answer"], 2 * patience)
    answer = store.get("answer").decode()
    store.set(f"heard_{rank}", "")
    if rank == 0:  # which may be the store's host: it must not leave first
        _wait_for(store, [f"heard_{r}" for r in range(world_size)], patience)
    return answer


def _wait_for(store: Store, keys: list[str], patience: datetime.timedelta) -> None:
    try:
        store.wait(keys, patience)
    except dist.DistStoreError:
        late = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise TimeoutError(
            f"ranks {', '.join(late)} of {len(keys)} did not answer within {patience.total_seconds():g} s. "
            "Look at their nodes and logs, or launch without them."
        ) from None


def stop() -> None:
    """Leave the mesh, so that `start` may lay out another one; all ranks call. Does nothing if none was
    started."""
    global _current
    if _current is None:
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    _current = None


def _check_layout(parallel: ParallelConfig, world_size: int) -> None:
    ranks = parallel.tp * parallel.pp
    if parallel.tp < 1 or parallel.pp < 1 or world_size % ranks:
        raise ValueError(
            f"world size {world_size} is not divisible by tp*pp = {parallel.tp}*{parallel.pp} = {ranks}. "
            f"Lower parallel.tp or parallel.pp (both at least 1), or launch a "
            f"multiple of {max(ranks, 1)} ranks."
        )


def _refuse_other_layout(wanted: ParallelConfig, running: ParallelConfig) -> None:
    names = ("tp", "pp", "virtual_stages")
    is_there, asked = (", ".join(f"{n} = {getattr(c, n)}" for n in names) for c in (running, wanted))
    if is_there != asked:
        raise ValueError(
            f"a mesh with {is_there} is running in this process; {asked} was asked for. "
            "Call iomm.parallel.mesh.stop() first."
        )


def _groups_of_one(groups: Any) -> "ProcessGroupCollection":
    """Groups in which this rank is alone with its weights, and data-parallel with the whole world."""
    me = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for name in (
        "tp",
        "pp",
        "cp",
        "ep",
        "mp",
        "tp_ep_pp",
        "tp_dp_cp",
        "expt_tp",
        "expt_dp",
        "embd",
        "pos_embd",
    ):
        setattr(groups, name, me)
    for name in ("dp", "dp_cp", "intra_dp_cp", "intra_dist_opt"):
        setattr(groups, name, dist.group.WORLD)
    groups.gtp_remat = groups.expt_gtp_remat = None  # weights sharded in yet another way; unused
    return groups


def _join() -> torch.device:
    """Start the default process group; the device this rank computes on."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    # One hardware queue keeps collectives and the products that overlap them in the order of their launch,
    # which Megatron's tensor and sequence parallelism rely on (and ask for on a CPU too).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        # All ranks are on this machine: they meet on its loopback, where nobody else can reach them.
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    if has_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if has_gpu else "gloo"
    if "RANK" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device_id = device if has_gpu else None
        dist.init_process_group(
            backend, store=_meeting_place(), rank=rank, world_size=world_size, device_id=device_id
        )
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return device


def _meeting_place() -> Store:
    """A part of torchrun's store that no rendezvous has used: it remembers what was written in an earlier
    one, and in an earlier launch."""
    global _store, _meetings
    if _store is None:
        store, rank, world_size = next(rendezvous("env://"))
        launch = agree_on_launch(PrefixStore("iomm", store), rank, world_size, _PATIENCE)
        _store = PrefixStore(launch, store)
    _meetings += 1
    return PrefixStore(f"mesh_{_meetings}", _store)
