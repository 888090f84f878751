"""Scores of benchmarks that a run's folder keeps, for its report.

RUN/scores/<bench>-<step>-<digest of judge and settings>.json    one score, whole or not at all

The same bench, step, judge and settings replace an older score; anything else stands beside it.
"""

import datetime
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from iomm.evaluation.bootstrap import Interval

FOLDER = "scores"


@dataclass(frozen=True, kw_only=True)
class BenchScore:
    """What a benchmark said of one checkpoint."""

    bench: str  # "geneval", "dpg", "shapes seen", ...
    step: int  # of the checkpoint
    prompts: int
    images_per_prompt: int
    judge: str  # who judged the pictures: a model and where its output came from, or an exact detector
    best: float  # the largest possible score: 1, 5, 100
    settings: dict[str, Any] = field(default_factory=dict)  # plain JSON: guidance, steps, seed, prompts used
    overall: Interval
    parts: dict[str, Interval] = field(default_factory=dict)  # in the benchmark's own order
    written: str = ""  # moment in UTC, ISO 8601; filled in by `leave_score`

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BenchScore":
        """What `asdict` gave.

        Raises:
            KeyError, TypeError: not the record of a score.
        """
        parts = {name: Interval(**interval) for name, interval in data["parts"].items()}
        return cls(**{**data, "overall": Interval(**data["overall"]), "parts": parts})


def leave_score(run_dir: Path, score: BenchScore) -> Path:
    """Keep a score in the folder of the run that the checkpoint belongs to; the file.

    Raises:
        OSError: the folder cannot be written to.
    """
    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    what = json.dumps([score.bench, score.judge, score.settings], sort_keys=True)
    digest = hashlib.sha256(what.encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", score.bench.lower()).strip("-")
    record = {**asdict(score), "written": moment}
    return write_json(run_dir / FOLDER / f"{name}-{score.step:08d}-{digest}.json", record)


def read_scores(run_dir: Path, notes: list[str]) -> dict[str, list[BenchScore]]:
    """The scores of a run by benchmark, each newest first: by step, then by when they were taken.

    Unreadable files are left out and appended to `notes`.
    """
    found: dict[str, list[BenchScore]] = {}
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        try:
            score = BenchScore.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{FOLDER}/{path.name} is no score and left out ({error!r}).")
            continue
        found.setdefault(score.bench, []).append(score)
    for scores in found.values():
        scores.sort(key=lambda score: (score.step, score.written), reverse=True)
    return dict(sorted(found.items()))


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write `record` as JSON, whole or not at all, in a folder that is made if need be; `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
