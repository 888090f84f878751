"""`iomm status RUN`: what a run is doing, from its folder alone, while it trains or afterwards.

A folder grows for weeks, so it is read once and then only what was added. Imports nothing heavy.
"""

import argparse
import datetime
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from iomm.evaluation.peaks import mfu
from iomm.evaluation.runlog import Record, require_run

DESCRIPTION = "what a run is doing: step, loss, speed, last checkpoint, restarts, time to go"
RECENT = 20  # logged steps whose mean loss is shown
# Events that a person should know of, whether or not the run went on.
NOTICES = (
    "nan_skip",
    "save_failed",
    "checkpoint_damaged",
    "cache_not_written",
    "hang",
    "loader_stall",
    "straggler",
)
NOTICE_LENGTH = 160
SILENT_AFTER_S = 300.0  # a run that says "running" and has not written for so long may be dead


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at one moment. None: not known, or not logged yet."""

    name: str
    state: str  # running | done | stopped | preempted | failed (run_state.json); "unknown" without it
    reason: str | None
    where: str | None  # host of rank 0, and SLURM's job
    updated: float | None  # when the run last said something; this and other moments: seconds since 1970
    step: int | None
    steps: int | None
    loss: float | None  # of the last logged step
    mean_loss: float | None  # of the last `recent` logged steps
    recent: int  # RECENT, or fewer at first; steps without a loss not counted
    heldout: dict[str, float]  # last held-out velocity loss by condition
    images_per_s: float | None
    step_ms: float | None
    tflops: float | None
    mfu: float | None
    checkpoint: Path | None
    checkpoint_at: float | None  # when it was complete
    skipped_steps: int  # for a loss or gradient that was not finite
    bad_samples: int
    restarts: int
    notice: str | None  # the last thing of NOTICES that happened

    def silent_at(self, now: float) -> bool:
        """Whether it says that it runs and has said nothing for long."""
        return self.state == "running" and self.updated is not None and now - self.updated > SILENT_AFTER_S

    @property
    def to_go_s(self) -> float | None:
        """Seconds of training left at the present speed, evaluations and saves not counted."""
        if self.step is None or self.steps is None or self.step_ms is None or self.state != "running":
            return None
        return (self.steps - self.step) * self.step_ms / 1000


@final
class Follower:
    """Reads a run's folder again and again, each time only what is new.

    Raises:
        ValueError: `folder` is not the folder of a run.
    """

    def __init__(self, folder: Path) -> None:
        require_run(folder)
        self.folder = folder
        self._metrics = _Lines(folder / "metrics.jsonl")
        self._quarantine = _Lines(folder / "quarantine.jsonl")
        self._train: deque[Record] = deque(maxlen=RECENT)
        self._evals: list[tuple[int, dict[str, float]]] = []  # step, held-out losses
        self._skipped: set[int] = set()
        self._bad: set[tuple[str, str]] = set()
        self._resumes = 0
        self._notice: str | None = None

    def read(self) -> Status:
        """The run as it is now."""
        for record in self._metrics.new():
            self._take(record)
        self._bad |= {(str(r.get("shard")), str(r.get("key"))) for r in self._quarantine.new()}
        run, state = _json(self.folder / "run.json"), _json(self.folder / "run_state.json")
        settings = (run.get("config") or {}).get("train") or {}
        last = self._train[-1] if self._train else {}
        losses = [r["loss"] for r in self._train if r.get("loss") is not None]
        tflops = math.fsum((last.get("tflops") or {}).values())
        checkpoint, checkpoint_at = _newest_checkpoint(self.folder / "checkpoints")
        job = f", job {state['job']}" if state.get("job") else ""
        return Status(
            name=str(run.get("name") or self.folder.resolve().name),
            state=str(state.get("state", "unknown")),
            reason=state.get("reason"),
            where=f"{state['host']}{job}" if state.get("host") else None,
            updated=_moment(state.get("updated")),
            step=last.get("step", state.get("step")),
            steps=settings.get("steps"),
            loss=last.get("loss"),
            mean_loss=math.fsum(losses) / len(losses) if losses else None,
            recent=len(losses),
            heldout=dict(self._evals[-1][1]) if self._evals else {},
            images_per_s=last.get("images_per_s"),
            step_ms=last.get("step_ms"),
            tflops=tflops or None,
            mfu=mfu(tflops, str(run.get("device")), run.get("world_size", 1), str(settings.get("precision"))),
            checkpoint=checkpoint,
            checkpoint_at=checkpoint_at,
            skipped_steps=len(self._skipped),
            bad_samples=len(self._bad),
            restarts=state.get("restarts", self._resumes),
            notice=self._notice,
        )

    def _take(self, record: Record) -> None:
        kind, event = record.get("kind"), record.get("event")
        if kind == "train":
            while self._train and self._train[-1]["step"] >= record["step"]:
                self._train.pop()  # the run went back to a checkpoint and repeats these
            while self._evals and self._evals[-1][0] >= record["step"]:
                self._evals.pop()
            self._train.append(record)
        elif kind == "eval" and record.get("velocity_loss"):
            self._evals.append((record["step"], record["velocity_loss"]))
        elif event == "nan_skip":
            self._skipped.add(record["step"])
        elif event == "resume":
            self._resumes += 1
        if event in NOTICES:
            self._notice = f"step {record.get('step')}, {event}: {str(record.get('detail'))[:NOTICE_LENGTH]}"


@final
class _Lines:
    """The JSON objects that a growing file of lines got since it was last read. A line that is not yet whole
    waits; a torn one is left out."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


def rows(status: Status, now: float | None = None) -> list[tuple[str, str]]:
    """(what, how much) in the order of reading; what the run did not say is left out.

    Args:
        now: moments are told as seconds before it; None: as date and time.
    """
    out = [("state", _state(status, now))]
    if status.step is not None:
        total = f" of {status.steps:,} ({status.step / status.steps:.1%})" if status.steps else ""
        out.append(("step", f"{status.step:,}{total}"))
    if status.loss is not None and status.mean_loss is not None:
        out.append(
            ("loss", f"{status.loss:.4f}, mean of the last {status.recent} logged {status.mean_loss:.4f}")
        )
    if status.heldout:
        out.append(("held-out loss", ", ".join(f"{name} {v:.4f}" for name, v in status.heldout.items())))
    if status.images_per_s is not None and status.step_ms is not None:
        work = f", {status.tflops:.3g} TFLOP/s" if status.tflops else ""
        out.append(("speed", f"{status.images_per_s:,.1f} images/s, {status.step_ms:,.0f} ms a step{work}"))
    if status.mfu is not None:
        out.append(("MFU", f"{status.mfu:.1%} of the bf16 peak"))
    if status.checkpoint is not None and status.checkpoint_at is not None:
        out.append(("last checkpoint", f"{status.checkpoint.name}, {_when(status.checkpoint_at, now)}"))
    else:
        out.append(("last checkpoint", "none yet"))
    out.append(("skipped", f"{status.skipped_steps:,} steps, {status.bad_samples:,} samples"))
    out.append(("restarts", f"{status.restarts:,}"))
    if status.notice is not None:
        out.append(("last notice", status.notice))
    if status.to_go_s is not None:
        out.append(("time to go", f"{duration(status.to_go_s)} of training at this speed"))
    return out


def render(status: Status) -> str:
    """Plain text, a line each."""
    lines = [status.name, *(f"  {what:<16} {how_much}" for what, how_much in rows(status, time.time()))]
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """In the two largest units: "45 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"."""
    left = max(0, round(seconds))
    for name, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {name}" + (f" {rest} {below}" if rest else "")
    return f"{left} s"


def _state(status: Status, now: float | None) -> str:
    if status.state == "unknown":
        return "not known: the folder has no run_state.json"
    text = status.state + (f": {status.reason}" if status.reason else "")
    if status.updated is not None:
        silent = now is not None and status.silent_at(now)
        text += (
            f", but silent since {_when(status.updated, now)}"
            if silent
            else f", {_when(status.updated, now)}"
        )
    return f"{text} on {status.where}" if status.where else text


def _newest_checkpoint(folder: Path) -> tuple[Path | None, float | None]:
    """The newest complete checkpoint, and when it was complete."""
    complete = sorted(p.parent for p in folder.glob("step_*/checkpoint.json"))
    if not complete:
        return None, None
    try:
        return complete[-1], (complete[-1] / "checkpoint.json").stat().st_mtime
    except FileNotFoundError:  # pruned since
        return None, None


def _moment(text: Any) -> float | None:
    return datetime.datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None


def _when(moment: float, now: float | None) -> str:
    if now is not None:
        return f"{duration(now - moment)} ago"
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _json(path: Path) -> Record:
    """A JSON object that the run replaces as a whole; empty where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `iomm status`."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="show it anew every so often (default 5) until the run ends or Ctrl-C; a preempted run goes on",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the status, once or until the run ends; one that made room is expected back."""
    if arguments.watch is not None and arguments.watch <= 0:
        raise ValueError(f"--watch {arguments.watch:g} must be positive: the seconds between two looks.")
    follower, screen = Follower(arguments.run), sys.stdout
    while True:
        status = follower.read()
        screen.write(("\x1b[H\x1b[J" if arguments.watch and screen.isatty() else "") + render(status))
        screen.flush()
        if arguments.watch is None or status.state not in ("running", "preempted"):
            return 0
        time.sleep(arguments.watch)
