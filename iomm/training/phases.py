"""What the loop is doing: `with phases("encode"): ...`.

One name at a time, for whoever wants to know: the watchdog (`current`, `since`), the straggler report
(`take_seconds`), the profiler and NVIDIA's tools (a range of that name in the trace).
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class Phases:
    """The phases of one rank. Seconds are the host's; on a GPU they are the device's, between two events of
    its stream, which is empty when a step begins: waiting for samples is in them, too.

    Attributes:
        step: the step that the phases belong to.
        current: the innermost phase that has begun; "start" before the first, "between" when there is none.
        since: `time.monotonic()` of the last beginning, end or sign of life.
    """

    def __init__(self, device: torch.device) -> None:
        self.current = "start"
        self.since = time.monotonic()
        self.step = 0
        self._on_gpu = device.type == "cuda"
        # Phases that ended: name, start, end. The oldest are forgotten if nobody takes them.
        self._marks: deque[tuple[str, Any, Any]] = deque(maxlen=10_000)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, began = self.current, self._mark()
        self.current, self.since = name, time.monotonic()
        # record_function is a range in torch.profiler's trace; NVTX one in Nsight's. Not yet run on a GPU.
        nvtx = torch.cuda.nvtx.range(name) if self._on_gpu else contextlib.nullcontext()
        try:
            with torch.profiler.record_function(name), nvtx:
                yield
        finally:
            self.since = time.monotonic()
            self._marks.append((name, began, self._mark()))
            self.current = "between" if outer == "start" else outer

    def alive(self) -> None:
        """Progress within the current phase."""
        self.since = time.monotonic()

    def take_seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call, those of a phase within another in both."""
        marks = list(self._marks)
        self._marks.clear()
        if self._on_gpu and marks:
            marks[-1][2].synchronize()
        seconds: dict[str, float] = {}
        for name, began, ended in marks:
            spent = began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began
            seconds[name] = seconds.get(name, 0.0) + spent
        return seconds

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
