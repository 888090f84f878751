"""Reads what a run leaves in its folder, also after kills and resumes.

    run.json           {"name", "config", "git", "started", "versions", "device", ...}
    metrics.jsonl      one JSON object a line: {"kind": "train" | "eval" | "event", "step": n, ...}
    samples/           step_000500_text.png, step_000500_reconstruction.png: grids of generated pictures
    quarantine.jsonl   {"shard", "key", "reason"}: samples that could not be used

A killed run may end in half a line; it is left out and named in `RunLog.notes`. A resumed run goes back
to its last checkpoint and repeats steps: what was logged beyond that point before the kill is superseded.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
GRID_NAME = re.compile(r"step_(\d+)_(\w+)\.png")


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """One run, as its folder tells it. Lists are in order of steps; an absent file gives an empty list."""

    folder: Path
    run: Record  # run.json; empty where there is none
    train: list[Record]
    evals: list[Record]
    events: list[Record]  # in the order they happened, also those of superseded steps
    quarantine: list[Record]  # each sample once, though a resumed run meets it again
    grids: dict[int, dict[str, Path]]  # step -> kind of grid -> file
    notes: list[str]  # what was missing, unreadable or superseded


def read_run(folder: Path) -> RunLog:
    """Read the run in `folder`.

    Raises:
        ValueError: `folder` is no folder, or holds neither run.json nor metrics.jsonl.
    """
    require_run(folder)
    notes: list[str] = []
    records = list(read_jsonl(folder / "metrics.jsonl", notes))
    train, evals, superseded = _last_word(records)
    if superseded:
        notes.append(f"{superseded} records were superseded: the run was resumed and repeated their steps.")
    grids: dict[int, dict[str, Path]] = {}
    for path in sorted((folder / "samples").glob("step_*.png")):
        if match := GRID_NAME.fullmatch(path.name):
            grids.setdefault(int(match[1]), {})[match[2]] = path
    quarantine = read_jsonl(folder / "quarantine.jsonl", notes, optional=True)
    return RunLog(
        folder=folder,
        run=_read_json(folder / "run.json", notes),
        train=train,
        evals=evals,
        events=[r for r in records if r.get("kind") == "event"],
        quarantine=list({(r.get("shard"), r.get("key")): r for r in quarantine}.values()),
        grids=grids,
        notes=notes,
    )


def read_jsonl(path: Path, notes: list[str], *, optional: bool = False) -> Iterator[Record]:
    """The JSON objects of `path`, one a line. Unreadable lines are left out and appended to `notes`.

    Args:
        optional: the absence of the file is nothing to note.
    """
    if not path.exists():
        if not optional:
            notes.append(f"{path.name} is missing.")
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((n for n, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            yield record
        elif number == last:
            notes.append(f"{path.name} ends in a torn line (the run was killed there); it is left out.")
        else:
            notes.append(f"{path.name}, line {number + 1}, is torn and left out.")


def _last_word(records: list[Record]) -> tuple[list[Record], list[Record], int]:
    """Train and eval records that were not superseded, by step, and how many were.

    A train record or a resume at step n says that the run stands at n: whatever was logged beyond n before
    belongs to an attempt that was lost.
    """
    kept: dict[str, list[Record]] = {"train": [], "eval": []}
    superseded = 0
    for record in records:
        kind, step = record.get("kind"), record.get("step")
        if not isinstance(step, int):
            continue
        rewinds = kind == "train" or record.get("event") == "resume"
        for name, stack in kept.items():
            limit = step - 1 if kind == name else step if rewinds else math.inf
            while stack and stack[-1]["step"] > limit:
                stack.pop()
                superseded += 1
        if kind in kept:
            kept[kind].append(record)
    return kept["train"], kept["eval"], superseded


def require_run(folder: Path) -> None:
    """Refuse what is not the folder of a run.

    Raises:
        ValueError: no folder, or one with neither run.json nor metrics.jsonl.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Name the folder of a run, for example runs/NAME.")
    if (folder / "run.json").exists() or (folder / "metrics.jsonl").exists():
        return
    inside = sorted(p.parent.name for p in folder.glob("*/metrics.jsonl"))
    hint = f"Name one of the runs in it: {', '.join(inside)}." if inside else "Name the folder of a run."
    raise ValueError(f"{folder} is no run: it has neither run.json nor metrics.jsonl. {hint}")


def _read_json(path: Path, notes: list[str]) -> Record:
    if not path.exists():
        notes.append(f"{path.name} is missing: name, configuration and versions of the run are not known.")
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        notes.append(f"{path.name} is not readable ({error}).")
        return {}
    if not isinstance(data, dict):
        notes.append(f"{path.name} holds no JSON object.")
        return {}
    return data
