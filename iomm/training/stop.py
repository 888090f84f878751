"""Stopping in good order: Ctrl-C, SIGTERM or SIGUSR1 finishes the step and saves; a second Ctrl-C stops at
once.

SIGUSR1 asks for more than an end: to be launched again (examples/slurm/train.sbatch sends it before the time
limit and when SLURM preempts the job). SLURM signals every process of a job step, and whom SIGUSR1 surprises
dies of it: torchrun, a rank that still imports torch, wandb's helper. So the launch script blocks it for all
of them. A blocked signal is not lost: it stays pending, and is looked up here once a step.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, final

# A launcher that decides whether to launch again names a file here, and rank 0 leaves its last word in it.
# With it a preempted rank exits 0, because torchrun would take 85 for a failure and start the rank again.
REQUEUE_FILE = "IOMM_REQUEUE_FILE"
REQUEUE_EXIT = 85


@final
class StopSignal:
    """While entered, remembers a request to stop instead of dying of it. Only the main thread can catch
    signals; elsewhere (a notebook's worker thread) nothing is installed."""

    def __init__(self) -> None:
        self._number = 0
        self._previous: dict[int, Any] = {}

    @property
    def number(self) -> int:
        """The signal that asked this process to stop; 0: none did."""
        return self._number or (signal.SIGUSR1 if signal.SIGUSR1 in signal.sigpending() else 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def tell_launcher(word: str) -> None:
    """Leave a word for who launched this: `saved` after a checkpoint, the signal's name after a stop. Only
    rank 0 does, and only if asked (`IOMM_REQUEUE_FILE`)."""
    file = os.environ.get(REQUEUE_FILE)
    if file and os.environ.get("RANK", "0") == "0":
        Path(file).write_text(f"{word}\n", encoding="utf-8")


def exit_status(stopped_by: int) -> int:
    """What a rank exits with that saved and was stopped by a signal; the launcher is told which.

    Returns:
        128 + n for signal n; for SIGUSR1 85 (SLURM's RequeueExit), or 0 with `IOMM_REQUEUE_FILE`.
    """
    tell_launcher(signal.Signals(stopped_by).name)
    if stopped_by != signal.SIGUSR1:
        return 128 + stopped_by
    return 0 if REQUEUE_FILE in os.environ else REQUEUE_EXIT
