"""The slowest rank, by name.

Ranks leave every step together, so the time of a step tells nothing about a rank. What tells is its own
work, up to where it waits for the others: samples, encoders, forward and backward, without the sum of
gradients. Ranks of one pipeline or one tensor-parallel group wait for each other inside that work and look
alike: then the report names the group's slowest only roughly.
"""

import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iomm.parallel.mesh import Mesh

SLOW_RATIO = 1.25  # own work against the median rank's, from which on a rank is called slow
SLOW_MS = 5.0  # and milliseconds a step above it: on a tiny model the ratio alone is noise


@dataclass(frozen=True)
class Straggler:
    """A rank whose own work takes longer than the others'."""

    rank: int
    host: str
    own_ms: float  # a step
    median_ms: float  # of all ranks
    phase: str  # where it loses most

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow: {self.own_ms:.1f} ms of own work a step, the median "
            f"rank {self.median_ms:.1f} ms; it loses most in {self.phase}"
        )


def own_work(seconds: Mapping[str, float]) -> dict[str, float]:
    """A rank's own work by phase, from the seconds of all its phases."""
    computing = seconds.get("step", 0.0) - seconds.get("gradient_sum", 0.0)
    return {"batch": seconds.get("batch", 0.0), "encode": seconds.get("encode", 0.0), "step": computing}


def find_straggler(
    seconds: Sequence[Mapping[str, float]], hosts: Sequence[str], steps: int
) -> Straggler | None:
    """The slowest rank, if it is slow.

    Args:
        seconds: of each phase, by rank, over `steps` steps.
        hosts: the ranks' machines.
    """
    works = [own_work(of_rank) for of_rank in seconds]
    totals = [round(1000 * sum(work.values()) / steps, 3) for work in works]
    slowest = max(range(len(totals)), key=totals.__getitem__)
    median = statistics.median_low(totals)
    if totals[slowest] < max(SLOW_RATIO * median, median + SLOW_MS):
        return None
    slow = works[slowest]
    lost = {name: slow[name] - statistics.median_low(work[name] for work in works) for name in slow}
    return Straggler(slowest, hosts[slowest], totals[slowest], median, max(lost, key=lost.__getitem__))


def compare(mesh: Mesh, seconds: Mapping[str, float], steps: int) -> tuple[dict[str, Any], Straggler | None]:
    """Tell all ranks how long each was busy; all ranks call.

    Args:
        seconds: of each phase on this rank, over `steps` steps.

    Returns:
        for the log: milliseconds a step of each phase, by rank; and the slowest rank if it is slow.
    """
    gathered = mesh.gather_objects((dict(seconds), socket.gethostname()))
    times, hosts = [of_rank for of_rank, _ in gathered], [host for _, host in gathered]
    phases = {name: [round(1000 * t.get(name, 0.0) / steps, 3) for t in times] for name in times[0]}
    return {"steps": steps, "phases_ms": phases}, find_straggler(times, hosts, steps)
