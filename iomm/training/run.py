"""A run's folder: what it is, what it did, and what it could not read.

    run.json            name, config, code revision, versions, device
    metrics.jsonl       one JSON object a line (iomm.evaluation.runlog says which)
    quarantine.jsonl    samples that could not be used
    samples/            grids of generated pictures
    scores/, reconstruction/    iomm.evaluation.scores
    checkpoints/        iomm.checkpoint.sharded
    lease.json          which launch may write here (iomm.checkpoint.lease)
    logs/               a log of each rank, with its stacks if it hung
    wandb/, wandb_id    offline by default
    profile/            traces of train.profile_steps

Only rank 0 writes; the other ranks' objects write their own log.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from iomm.checkpoint.folder import private_folder
from iomm.checkpoint.lease import Lease
from iomm.config import Config
from iomm.data.decoder import decoder_used
from iomm.data.errors import BadSampleReport
from iomm.evaluation.runlog import read_jsonl
from iomm.files import write_whole
from iomm.parallel.agreement import code_digest
from iomm.parallel.mesh import Mesh
from iomm.training.ranklog import RankLog

_log = logging.getLogger(__name__)
_VERSIONED = ("torch", "megatron-core", "transformers", "diffusers")


class Run:
    """Writes one run's folder. A context manager: closes files and wandb, whatever ends the run.

    Its methods raise `Superseded`, on rank 0, once another launch has taken over the run.

    Attributes:
        lease: this launch's right to write; taken here.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.dir = config.run_dir
        private_folder(self.dir)
        self.writes = mesh.rank == 0
        self._metrics: TextIO | None = None
        self._wandb: Any = None
        self._rank_log = RankLog(self.dir, mesh)
        self.lease = Lease(self.dir, writes=self.writes)
        if not self.writes:
            return
        (self.dir / "samples").mkdir(parents=True, exist_ok=True)
        written = json.dumps(describe(config, mesh), indent=1, default=_plain)
        write_whole(self.dir / "run.json", written + "\n")
        self._metrics = (self.dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        _end_torn_line(self.dir / "metrics.jsonl", self._metrics)
        if config.train.wandb != "disabled":
            import wandb

            self._wandb = wandb.init(
                project="iomm",
                name=config.name,
                dir=str(self.dir),
                mode=config.train.wandb,
                config=config.to_dict(),
                id=_wandb_id(self.dir),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
            # Steps as a figure of their own: wandb's counter goes up only, and a resumed run repeats steps.
            self._wandb.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; numbers go to wandb as well."""
        if self._metrics is None:
            return
        self.lease.check()
        self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._wandb is not None and kind != "event":
            self._wandb.log({"step": step} | {f"{kind}/{key}": value for key, value in _numbers(values)})

    def event(self, step: int, event: str, detail: Any = None) -> None:
        """Something that happened: resume, save, nan_skip, bad_sample, stop. Ranks log what they see."""
        self._rank_log.note(f"step {step}: {event} {detail}")
        self.log("event", step, event=event, detail=detail)

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation after a step."""
        records = read_jsonl(self.dir / "metrics.jsonl", [])
        return any(record.get("kind") == "eval" and record.get("step") == step for record in records)

    def painted(self, step: int) -> bool:
        """Whether the grid of the example prompts is there."""
        return self.grid_path(step).is_file()

    def grid_path(self, step: int) -> Path:
        """The grid of the example prompts after a step."""
        return self.dir / f"samples/step_{step:06d}_text.png"

    def bad_sample(self, report: BadSampleReport) -> None:
        """Put a sample on the quarantine list."""
        if self.writes:
            with (self.dir / "quarantine.jsonl").open("a", encoding="utf-8") as file:
                entry = {"shard": str(report.shard), "key": report.key, "reason": report.reason}
                file.write(json.dumps(entry) + "\n")

    def __enter__(self) -> "Run":
        self._rank_log.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._rank_log.__exit__(*error)
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error[0] is None else 1)


def describe(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What run.json holds."""
    on_gpu = mesh.device.type == "cuda"
    return {
        "name": config.name,
        "config": config.to_dict(),
        "git": _revision(),
        "code": code_digest(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "iomm": importlib.metadata.version("iomm"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _VERSIONED},
        },
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {torch.get_num_threads()} threads a rank",
        "world_size": mesh.world_size,
        "decoding": decoder_used(config.data),
    }


def _wandb_id(run_dir: Path) -> str:
    """The run's id at wandb, kept in its folder: a resumed run goes on in the same wandb run, and another run
    of the same name, in another folder, gets its own."""
    path = run_dir / "wandb_id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")


def _revision() -> str | None:
    """The commit this code is at, with "+" if the work tree differs; None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def _end_torn_line(path: Path, file: TextIO) -> None:
    """A killed run may have left half a line: end it, so that the next line stands alone."""
    with path.open("rb") as existing:
        if existing.seek(0, os.SEEK_END):
            existing.seek(-1, os.SEEK_END)
            if existing.read() != b"\n":
                file.write("\n")


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            out.append((prefix + key, value))
    return out
