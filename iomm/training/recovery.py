"""Going on from the newest checkpoint that can be read; and saying so when another rank is gone.

A crash may leave the newest one with holes (a disk that lost what it had confirmed), a person may have
removed a file. Such a checkpoint is set aside, said, and the one before it is taken. A run that has
checkpoints and can read none of them stops, at this launch and at every later one: it never starts over by
itself. A disk that does not answer, or memory that does not suffice, is no damage: the run ends, and the next
launch tries the same checkpoint.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from iomm.checkpoint import sharded
from iomm.checkpoint.folder import DAMAGED, DamagedCheckpoint, latest, set_aside
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
    changed: tuple[str, ...] = ()  # settings that are not those of the checkpoint: name, before, now


def newest(checkpoints: Path, mesh: Mesh) -> Path | None:
    """The newest complete checkpoint as rank 0 sees it, since other machines may see an older state of the
    disk; None if there is none. All ranks call."""
    return on_rank_0(mesh, lambda: latest(checkpoints))


def begins(checkpoints: Path, mesh: Mesh) -> bool:
    """Whether a run starts, because it has no checkpoint yet; all ranks call.

    Raises:
        DamagedCheckpoint: it had some, and all were set aside.
    """

    def look() -> bool:
        aside = sorted(path.name for path in checkpoints.glob(f"{DAMAGED}*"))
        if aside and latest(checkpoints) is None:
            raise DamagedCheckpoint(
                f"none of the checkpoints in {checkpoints} can be read: {', '.join(aside)} were set aside. "
                "Give one that you restored its old name, or start again under another name."
            )
        return latest(checkpoints) is None

    return on_rank_0(mesh, look)


def resume(checkpoints: Path, engine: Engine, config: Config, mesh: Mesh) -> Resumed:
    """Put the engine back to the newest checkpoint that can be read; all ranks call.

    Raises:
        CheckpointError: the newest is of another architecture, or saved with settings that this run cannot go
            on from; that is not what an older one would mend.
        DamagedCheckpoint: there are checkpoints, and none can be read.
    """
    damaged: list[str] = []
    begins(checkpoints, mesh)
    while (path := newest(checkpoints, mesh)) is not None:
        try:
            info = sharded.load(path, engine, config, mesh)
        except DamagedCheckpoint as error:
            # One that is gone was pruned meanwhile, by a launch that is not quite dead yet.
            aside = on_rank_0(mesh, lambda path=path: set_aside(path) if path.is_dir() else None)
            damaged += [] if aside is None else [f"{error} It is now {aside}."]
        else:
            return Resumed(path, info.step, tuple(damaged), differing(info.config, config.to_dict()))
    if damaged:
        raise DamagedCheckpoint(
            f"none of the checkpoints in {checkpoints} can be read: {' '.join(damaged)} Give one that you "
            "restored its old name, or start again under another name."
        )
    return Resumed(None, 0, ())


def differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Each setting that two configurations have otherwise, as `a.b: before, now after`."""
    changes: list[str] = []
    for key in (key for key in now if key in before):  # what an earlier version had not is no change
        one, other = before[key], now[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            changes += differing(one, other, f"{prefix}{key}.")
        elif json.dumps(one) != json.dumps(other):  # a list in JSON, a tuple here
            changes.append(f"{prefix}{key}: {one}, now {other}")
    return tuple(changes)


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
