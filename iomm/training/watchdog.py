"""A rank that makes no progress says where it stands, and ends.

Each rank watches itself: one that hangs makes all others wait in a collective, so all of them run out of
time within the same step, and each writes its own stacks. Then it ends with status 86, and torchrun's agent
(or SLURM) starts the ranks again from the last checkpoint. Python's faulthandler stands behind the watching
thread: it needs no Python, so it also ends a rank whose C code does not let the thread run; such a rank
writes bare stacks and ends with status 1.
"""

import datetime
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self, TextIO, final

import torch.distributed as dist

from iomm.data.loader import Reading
from iomm.training.phases import Phases

HUNG_EXIT = 86
# Where torch's collectives are, and what stands between them and who calls.
_DISTRIBUTED = "torch/distributed/distributed_c10d.py"
_WRAPPERS = ("torch/distributed/c10d_logger.py", "/contextlib.py")
_log = logging.getLogger(__name__)


@final
class Watchdog:
    """While entered, watches over the progress of one rank from a thread of its own.

    Args:
        phases: what the rank is doing; the begin and the end of a phase are progress, and `Phases.alive`.
        log: the file that stacks are appended to.
        rank: for the messages.
        timeout_s: without progress for so long the rank is hung; 0: it never is.
        stall_s: waiting for samples for so long is said, once a step; 0: it never is.
        reading: what the loader's threads are reading.
        on_stall: told of a wait for samples, from the watching thread.
        on_hang: told why the rank ends, just before it does, from the watching thread.
        end: ends the process.
    """

    def __init__(
        self,
        phases: Phases,
        log: Path,
        rank: int,
        *,
        timeout_s: float,
        stall_s: float,
        reading: Callable[[], Sequence[Reading]],
        on_stall: Callable[[str], None],
        on_hang: Callable[[str], None],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._phases, self._path, self._rank = phases, log, rank
        self._timeout_s, self._stall_s = timeout_s, stall_s
        self._reading, self._on_stall, self._on_hang, self._end = reading, on_stall, on_hang, end
        limits = [limit for limit in (timeout_s, stall_s) if limit > 0]
        self._poll_s = min([5.0, *(limit / 8 for limit in limits)])
        self._grace_s = max(2 * self._poll_s, timeout_s / 10)
        self._stalled_step: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if limits else None
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._file = self._path.open("a", encoding="utf-8")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is None or self._file is None:
            return
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def _watch(self) -> None:
        assert self._file is not None
        while True:
            if self._timeout_s > 0:  # from now on, if this thread does not come back here
                later = self._timeout_s + 2 * self._poll_s
                faulthandler.dump_traceback_later(later, exit=True, file=self._file)
            if self._over.wait(self._poll_s):
                return
            idle_s = time.monotonic() - self._phases.since
            if 0 < self._stall_s <= idle_s and self._phases.current == "batch":
                self._say_stall(idle_s)
            if 0 < self._timeout_s <= idle_s:
                self._give_up(idle_s)
                return

    def _say_stall(self, idle_s: float) -> None:
        step = self._phases.step
        if self._stalled_step != step:
            self._stalled_step = step
            message = f"step {step} has been waiting for samples for {idle_s:.0f} s{self._readings()}"
            _log.warning("%s", message)
            self._on_stall(message)

    def _give_up(self, idle_s: float) -> None:
        """Write where everything stands, then end."""
        assert self._file is not None
        phase, step = self._phases.current, self._phases.step
        stacks = _stacks()
        calls = list(dict.fromkeys(filter(None, (collective(frames) for _, frames in stacks))))
        where = f" ({', '.join(calls)})" if calls else ""
        reading = self._readings() if phase == "batch" else ""
        reason = (
            f"rank {self._rank} on {socket.gethostname()} made no progress for {idle_s:.0f} s "
            f"(train.hang_timeout_s) in step {step}, phase {phase}{where}{reading}; stacks in {self._path}"
        )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._file.write(f"== {now} process {os.getpid()}: {reason}\n")
        for name, frames in stacks:
            self._file.write(f"-- thread {name}\n{''.join(traceback.format_list(frames))}")
        self._file.write(_nccl_trace())
        self._file.flush()
        sys.stderr.write(f"iomm: {reason}; ends with status {HUNG_EXIT}\n")
        sys.stderr.flush()
        try:
            self._on_hang(reason)
        except Exception as error:  # a full disk must not keep the rank alive
            sys.stderr.write(f"iomm: {type(error).__name__}: {error}\n")
        # The other ranks run out of time up to a step earlier or later; the agent kills them with the first.
        self._over.wait(self._grace_s)
        self._end(HUNG_EXIT)

    def _readings(self) -> str:
        """What the loader is at, the longest first."""
        now = time.monotonic()
        readings = sorted(self._reading(), key=lambda reading: reading.since)
        parts = [f"{r.key} of {r.shard} for {now - r.since:.0f} s" for r in readings[:3]]
        return f"; the loader is reading sample {', '.join(parts)}" if parts else "; the loader reads nothing"


def collective(frames: traceback.StackSummary) -> str | None:
    """The torch.distributed call that a stack stands in, the innermost, and who made it; None if in none."""
    inside = [f.filename.endswith(_DISTRIBUTED) for f in frames]
    names = [f.name for f, is_inside in zip(frames, inside, strict=True) if is_inside]
    if not names:
        return None
    name = next((name for name in reversed(names) if not name.startswith("_")), names[-1].strip("_"))
    callers = [f.name for f in frames[: inside.index(True)] if not f.filename.endswith(_WRAPPERS)]
    return f"{name} called by {callers[-1]}" if callers else name


def _stacks() -> list[tuple[str, traceback.StackSummary]]:
    """Name and stack of every thread of this process but the caller, the main thread first."""
    main = threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames: dict[int, FrameType] = sys._current_frames()
    frames.pop(threading.get_ident())
    order = sorted(frames, key=lambda ident: ident != main)
    return [(names.get(i, str(i)), traceback.extract_stack(frames[i])) for i in order]


def _nccl_trace() -> str:
    """NCCL's flight recorder: collectives that were launched and have not ended, also those that no Python
    call waits for. Not yet run on a GPU."""
    if not dist.is_initialized() or dist.get_backend() != "nccl":
        return ""
    from torch._C import _distributed_c10d as c10d

    dump: Any = vars(c10d)["_dump_nccl_trace_json"]  # torch's type stubs do not know it
    entries = json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries", [])
    fields = ("profiling_name", "state", "input_sizes", "process_group")
    return "".join(f"-- NCCL: {' '.join(str(entry[f]) for f in fields)}\n" for entry in entries)
