"""Going on from the newest checkpoint that can be read; and saying so when another rank is gone.

A crash may leave the newest one with holes (a disk that lost what it had confirmed), a person may have
removed a file. Such a checkpoint is set aside, said, and the one before it is taken. A run that has
checkpoints and can read none of them stops: it never starts over by itself.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from iomm.checkpoint import sharded
from iomm.checkpoint.folder import DamagedCheckpoint, latest, set_aside
from iomm.checkpoint.ranks import on_rank_0
from iomm.config import Config
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh
from iomm.training.phases import Phases


class RankLost(RuntimeError):
    """Another rank, or the way to it, is gone. The fault is there, not here."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    path: Path | None  # the checkpoint; None: it starts
    step: int  # optimizer steps done
    damaged: tuple[str, ...]  # of each newer checkpoint that could not be read, why, and where it is now


def newest(checkpoints: Path, mesh: Mesh) -> Path | None:
    """The newest complete checkpoint as rank 0 sees it, since other machines may see an older state of the
    disk; None if there is none. All ranks call."""
    return on_rank_0(mesh, lambda: latest(checkpoints))


def resume(checkpoints: Path, engine: Engine, config: Config, mesh: Mesh) -> Resumed:
    """Put the engine back to the newest checkpoint that can be read; all ranks call.

    Raises:
        CheckpointError: the newest is of another architecture, or saved with settings that this run cannot go
            on from; that is not what an older one would mend.
        DamagedCheckpoint: there are checkpoints, and none can be read.
    """
    damaged: list[str] = []
    while (path := newest(checkpoints, mesh)) is not None:
        try:
            step = sharded.load(path, engine, config, mesh).step
        except DamagedCheckpoint as error:
            # One that is gone was pruned meanwhile, by a launch that is not quite dead yet.
            aside = on_rank_0(mesh, lambda path=path: set_aside(path) if path.is_dir() else None)
            damaged += [] if aside is None else [f"{error} It is now {aside}."]
        else:
            return Resumed(path, step, tuple(damaged))
    if damaged:
        raise DamagedCheckpoint(
            f"none of the checkpoints in {checkpoints} can be read: {' '.join(damaged)} Give one that you "
            "restored its old name, or start again under another name."
        )
    return Resumed(None, 0, ())


@contextlib.contextmanager
def naming_lost_ranks(mesh: Mesh, phases: Phases) -> Iterator[None]:
    """Errors of the network, which torch raises where a rank is gone, become `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        raise RankLost(
            f"rank {mesh.rank} lost another rank in step {phases.step}: {str(error).partition('. ')[0]}. "
            "What ended that one is in its log, or its machine is gone. The launcher starts all ranks again, "
            "from the last checkpoint; without one, do it by hand."
        ) from error
