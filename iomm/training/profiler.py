"""`train.profile_steps`: torch.profiler over a window of steps, a trace file a rank.

The traces go to RUN/profile/ and open in Perfetto (ui.perfetto.dev) or chrome://tracing; the loop's phases
are ranges in them. Nsight sees the same names as NVTX ranges, with or without this window. Not yet run on a
GPU.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch.profiler import ProfilerActivity, profile

_log = logging.getLogger(__name__)


@final
class ProfileWindow:
    """Records one window of steps. A context manager: a window is written too that the run's end or
    stop cuts short.

    Args:
        steps: the first and the last step, both within; None: nothing is recorded.
        run_dir: the run's folder.
        rank: of this process.
        device: where it computes.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, rank: int, device: torch.device) -> None:
        self._steps = steps
        self._folder = run_dir / "profile"
        self._rank = rank
        self._on_gpu = device.type == "cuda"
        self._profiler: Any = None
        self._first = 0

    def at(self, step: int) -> Path | None:
        """`step` is about to begin. Returns the trace file that was written, behind the window's last step. A
        run that resumes within the window records the rest of it."""
        if self._steps is None:
            return None
        first, last = self._steps
        if self._profiler is None and first <= step <= last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._profiler, self._first = profile(activities=activities), step
            self._profiler.start()
        return self._write(last) if step > last else None

    def _write(self, last: int) -> Path | None:
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        if self._on_gpu:
            torch.cuda.synchronize()
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps_{self._first:08d}-{last:08d}_rank_{self._rank:05d}.json.gz"
        profiler.export_chrome_trace(str(path))
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._steps is None or self._profiler is None:
            return
        if kind is None:
            self._write(self._steps[1])
            return
        try:
            self._profiler.stop()  # left running, it would crash the process at its end
        except RuntimeError as broken:  # so is the device; what went wrong first is on its way
            _log.warning("the profiler does not stop: %s", broken)
