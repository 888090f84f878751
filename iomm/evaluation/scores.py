"""What a run's folder keeps of evaluations, for its report.

RUN/scores/<bench>-<step>-<digest of the rest>.json      one score of a benchmark
RUN/reconstruction/step_<step>-<digest of the rest>.json  PSNR against the mask ratio

A file is written whole or not at all. What was taken in the same way (bench, step, judge, settings, prompts,
images; step, images, mask ratios, sampler steps) replaces an older file; anything else stands beside it.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from iomm.evaluation.bootstrap import Interval
from iomm.files import write_whole

SCORES = "scores"
RECONSTRUCTIONS = "reconstruction"


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
        parts = {name: Interval(**data["parts"][name]) for name in data["parts"]}
        return cls(**{**data, "overall": Interval(**data["overall"]), "parts": parts})


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """PSNR in dB of images generated from their own tokens, with the bootstrap interval over images."""

    step: int  # of the checkpoint
    images: int
    sampler_steps: int
    trained_mask_ratio: float
    ratios: list[float]  # ascending
    psnr_db: list[Interval]  # one a ratio

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Reconstruction":
        """What `asdict` gave.

        Raises:
            KeyError, TypeError: not the record of a reconstruction.
        """
        return cls(**{**data, "psnr_db": [Interval(**interval) for interval in data["psnr_db"]]})


def leave_score(run_dir: Path, score: BenchScore) -> Path:
    """Keep a score in the folder of the run that the checkpoint belongs to; the file.

    Raises:
        OSError: the folder cannot be written to.
    """
    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    digest = _digest(score.bench, score.judge, score.settings, score.prompts, score.images_per_prompt)
    name = re.sub(r"[^a-z0-9]+", "-", score.bench.lower()).strip("-")
    record = {**asdict(score), "written": moment}
    return write_json(run_dir / SCORES / f"{name}-{score.step:08d}-{digest}.json", record)


def read_scores(run_dir: Path, notes: list[str]) -> dict[str, list[BenchScore]]:
    """The scores of a run by benchmark, each newest first: by step, then by when they were taken.

    Unreadable files are left out and appended to `notes`.
    """
    found: dict[str, list[BenchScore]] = {}
    for path in sorted((run_dir / SCORES).glob("*.json")):
        score = _read(path, BenchScore.from_dict, notes)
        if score is not None:
            found.setdefault(score.bench, []).append(score)
    for scores in found.values():
        scores.sort(key=lambda score: (score.step, score.written), reverse=True)
    return dict(sorted(found.items()))


def reconstruction_path(run_dir: Path, found: Reconstruction) -> Path:
    """Where a measurement is kept."""
    digest = _digest(found.images, found.ratios, found.sampler_steps)
    return run_dir / RECONSTRUCTIONS / f"step_{found.step:08d}-{digest}.json"


def read_reconstruction(run_dir: Path, notes: list[str]) -> Reconstruction | None:
    """Of the readable ones of the highest step the one with the most ratios, then images; None if there is
    none. Unreadable ones are appended to `notes`."""
    paths = sorted((run_dir / RECONSTRUCTIONS).glob("step_*.json"))
    found = [one for path in paths if (one := _read(path, Reconstruction.from_dict, notes)) is not None]
    return max(
        found, key=lambda one: (one.step, len(one.ratios), one.images, one.sampler_steps), default=None
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _read[T](path: Path, from_dict: Callable[[dict[str, Any]], T], notes: list[str]) -> T | None:
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        name = f"{path.parent.name}/{path.name}"
        notes.append(f"{name} is not what iomm writes there and left out ({type(error).__name__}: {error}).")
        return None


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write `record` as JSON, whole or not at all, in a folder that is made if need be; `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return path
