"""One rank of a run that things happen to: `iomm train` with a fault in it.

worker.py CONFIG.json PLAN FOLDER     under torchrun, or forked by `chaos.py`

The number of lines in FOLDER/happened.jsonl says which fault of the plan is next; the rank that it strikes
adds its line and then suffers it. Checkpoints are written at once and in the background by turns.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from iomm.config import Config
from iomm.training.phases import Phases
from iomm.training.train import train
from tests.chaos.plan import Fault, read_plan

HAPPENED = "happened.jsonl"
# Seconds that phases of the shrunken run take on one slow core; "start": from the fork to the first step.
USUAL_S = {"start": 3.0, "batch": 0.02, "encode": 0.05, "step": 0.1, "log": 0.01, "evaluate": 0.3}
FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.scandir"}


class Misfortune:
    """Waits for the fault's moment, in this rank."""

    def __init__(self, fault: Fault, run_dir: Path, folder: Path) -> None:
        self.fault, self.folder = fault, folder
        self.checkpoints = str(run_dir / "checkpoints")
        self.step, self.operations = 0, 0
        self.saving = self.over = False
        self._once = threading.Lock()

    def prepare(self) -> None:
        """Be told of the phases and of what is done to files."""
        if self.fault.phase == "start":
            self._strike_later()
            return
        real = Phases.__call__

        @contextlib.contextmanager
        def watched(phases: Phases, name: str) -> Iterator[None]:
            with real(phases, name):
                self._enter(phases.step, name)
                yield

        Phases.__call__ = watched  # type: ignore[method-assign]
        sys.addaudithook(self._audit)

    def _enter(self, step: int, phase: str) -> None:
        if phase != self.fault.phase or step < self.fault.step or self.saving or self.over:
            return
        self.step = step
        if phase == "save":
            self.saving = True
        elif self.fault.kind == "hang":
            self._tell()
            threading.Event().wait()
        else:
            self._strike_later()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.saving or event not in FILE_OPERATIONS or self.over:
            return
        if str(arguments[0]).startswith(self.checkpoints):
            self.operations += 1
            if self.operations == self.fault.operation:
                self.strike(f"{event} {Path(str(arguments[0])).name}")

    def _strike_later(self) -> None:
        self.over = True
        timer = threading.Timer(self.fault.moment * USUAL_S[self.fault.phase], self.strike)
        timer.daemon = True
        timer.start()

    def strike(self, at: str = "") -> None:
        """It happens now, and once."""
        self._once.acquire()
        self.over = True
        self._tell(at)
        number = signal.SIGKILL if self.fault.kind == "kill" else signal.SIGSTOP
        os.kill(os.getpid(), number)

    def _tell(self, at: str = "") -> None:
        record = {"fault": str(self.fault), "at_step": self.step, "at": at, "pid": os.getpid()}
        descriptor = os.open(self.folder / HAPPENED, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (json.dumps(record) + "\n").encode())
        os.fsync(descriptor)
        os.close(descriptor)


def happened(folder: Path) -> list[dict[str, Any]]:
    """The faults that were suffered so far."""
    path = folder / HAPPENED
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(config_file: Path, plan_file: Path, folder: Path) -> NoReturn:
    """Train until the end, or until the next fault, and end as the command does."""
    status = 1
    try:
        _train(config_file, plan_file, folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(config_file: Path, plan_file: Path, folder: Path) -> None:
    faults, number = read_plan(plan_file), len(happened(folder))
    config = Config.from_dict(json.loads(config_file.read_text()))
    config = config.override([f"train.async_save={json.dumps(number % 2 == 1)}"])
    misfortune = None
    if number < len(faults) and faults[number].rank == int(os.environ["RANK"]):
        misfortune = Misfortune(faults[number], config.run_dir, folder)
        misfortune.prepare()
    train(config)
    if misfortune is not None:  # the run was quicker than its moment
        misfortune.strike("after its end")


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
