"""What goes wrong, where and when: a seeded list of faults."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["kill", "hang", "ghost"]
TIMED = ("start", "batch", "encode", "step", "log", "evaluate")  # phases that are cut at a moment of time
# File operations of a save, by rank: a kill stands before one of these. Rank 0 makes, publishes and prunes
# folders, the others make a folder and open their file.
SAVE_OPERATIONS = (18, 2)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One rank's misfortune. It happens in the first `phase` at or after `step`.

    kill: SIGKILL. hang: the rank stops for ever. ghost: both ranks freeze, the run is launched again beside
    them, then they thaw.
    """

    kind: Kind
    rank: int
    step: int
    phase: str  # one of TIMED, or "save"
    moment: float  # in [0, 1): of the phase's usual time; in a save, of its file operations

    def __str__(self) -> str:
        operation = f"before file operation {self.operation}"
        when = operation if self.phase == "save" else f"at {self.moment:.2f} of its time"
        return f"{self.kind} rank {self.rank} from step {self.step} on in {self.phase}, {when}"

    @property
    def operation(self) -> int:
        """Number of the file operation before which a save is cut."""
        return 1 + int(self.moment * SAVE_OPERATIONS[min(self.rank, 1)])


def make_plan(
    seed: int, kills: int, steps: int, *, ranks: int = 2, hangs: int = 0, ghosts: int = 0
) -> list[Fault]:
    """Faults of a run of `steps` steps, in the order in which they happen.

    Two in five kills fall into a save. Hangs and ghosts take the place of no kill.
    """
    draw = random.Random(seed)
    kinds: list[Kind] = ["kill"] * kills + ["hang"] * hangs + ["ghost"] * ghosts
    draw.shuffle(kinds)
    places = sorted(draw.randint(1, steps - 1) for _ in kinds)
    return [_fault(draw, kind, step, ranks) for kind, step in zip(kinds, places, strict=True)]


def _fault(draw: random.Random, kind: Kind, step: int, ranks: int) -> Fault:
    save = draw.random() < 0.4
    phase = "save" if save else draw.choice(TIMED)
    fault = Fault(kind=kind, rank=draw.randrange(ranks), step=step, phase=phase, moment=draw.random())
    if kind == "kill":
        return fault
    return replace(fault, phase=draw.choice(("batch", "encode", "step")))


def write_plan(path: Path, faults: Sequence[Fault]) -> None:
    path.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in faults))


def read_plan(path: Path) -> list[Fault]:
    return [Fault(**json.loads(line)) for line in path.read_text().splitlines()]
