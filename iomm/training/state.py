"""`run_state.json` in a run's folder: what the run is doing, or why it does nothing. Imports no torch.

Rank 0 writes it whenever a line of metrics.jsonl is due, after every checkpoint and at the end; a reader sees
one whole version, because it is renamed into place. A process that is killed cannot say so: it leaves
`running` with an `updated` that grows old, and the next launch counts a restart.
"""

import datetime
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, final

from iomm.checkpoint.lease import Lease, Superseded
from iomm.files import write_whole

_log = logging.getLogger(__name__)
STATE_FILE = "run_state.json"
State = Literal["running", "done", "stopped", "preempted", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One version of `run_state.json`.

    running: training, if `updated` is recent. done: at its last step. stopped: saved, asked to end.
    preempted: saved, asked to make room and to be launched again. failed: `reason` says why.
    """

    state: State
    step: int  # optimizer steps done
    reason: str | None  # the signal or the error's message; None while running and when done
    restarts: int  # launches in this folder after the first, by torchrun, SLURM or hand
    host: str  # of rank 0
    pid: int  # of rank 0
    job: str | None  # SLURM's job id, of an array task ID_INDEX
    updated: str  # UTC, ISO 8601, to the second
    last_checkpoint: str | None  # the folder of the newest one


def read_state(run_dir: Path) -> RunState | None:
    """The state of the run in `run_dir`; None if it has none.

    Raises:
        ValueError: the file is no state. It is replaced as a whole, so somebody else wrote it.
    """
    path = run_dir / STATE_FILE
    try:
        return RunState(**_known(json.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the state of a run ({error}). Remove it: the next launch writes a new one."
        ) from error


@final
class StateFile:
    """Keeps `run_state.json` while a run lasts. A context manager: an error that passes through it before
    `end` makes the run `failed`.

    Args:
        run_dir: the run's folder; it exists.
        step: optimizer steps done so far.
        last_checkpoint: the folder that the run goes on from.
        writes: False on every rank but rank 0: then nothing is read or written.
        lease: what allows this launch to write; without it any launch may.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        last_checkpoint: Path | None,
        *,
        writes: bool,
        lease: Lease | None = None,
    ) -> None:
        self._path = run_dir / STATE_FILE
        self._check: Callable[[], None] = lease.check if lease is not None else lambda: None
        self._writes = writes
        before = self._before(run_dir) if writes else None
        self._state = RunState(
            state="running",
            step=step,
            reason=None,
            restarts=0 if before is None else before.restarts + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=slurm_job(os.environ),
            updated="",
            last_checkpoint=None if last_checkpoint is None else str(last_checkpoint),
        )
        self._write()

    @staticmethod
    def _before(run_dir: Path) -> RunState | None:
        """The last launch's state; None where a crash left a torn file, which this launch writes over."""
        try:
            return read_state(run_dir)
        except ValueError as error:
            _log.warning("%s It counts as none.", error)
            return None

    def update(self, step: int) -> None:
        """The run is alive after `step` optimizer steps."""
        self._write(step=step)

    def saved(self, path: Path) -> None:
        """`path` is the newest checkpoint."""
        self._write(last_checkpoint=str(path))

    def end(self, state: State, step: int, reason: str | None = None) -> None:
        """The run ended in good order after `step` optimizer steps."""
        self._write(state=state, step=step, reason=reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and not issubclass(kind, Superseded) and self._state.state == "running":
            self._write(state="failed", reason=f"{kind.__name__}: {error}")

    def _write(self, **changes: Any) -> None:
        self._state = replace(self._state, updated=_now(), **changes)
        if not self._writes:
            return
        self._check()
        write_whole(self._path, json.dumps(asdict(self._state), indent=1) + "\n")


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """What squeue calls the SLURM job with this environment; None outside SLURM."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment.get("SLURM_JOB_ID")


def _known(data: Any) -> dict[str, Any]:
    """The fields of this version: a newer one may have written more."""
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    names = {field.name for field in fields(RunState)}
    return {key: value for key, value in data.items() if key in names}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
