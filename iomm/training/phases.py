"""What the loop is doing: `with phases("encode"): ...`.

One name at a time, for whoever wants to know: the watchdog (`current`, `since`), the straggler report
(`take_seconds`), the profiler and NVIDIA's tools (a range of that name in the trace).
"""

import contextlib
import time
from collections.abc import Iterator

import torch


class Phases:
    """The phases of one rank. Seconds are the host's: on a GPU work that was only launched is not in them.

    Attributes:
        current: the innermost phase that has begun; "start" before the first, "between" when there is none.
        since: `time.monotonic()` of the last beginning or end.
    """

    def __init__(self, device: torch.device) -> None:
        self.current = "start"
        self.since = time.monotonic()
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer, began = self.current, time.monotonic()
        self.current, self.since = name, began
        # record_function is a range in torch.profiler's trace; NVTX one in Nsight's. Not yet run on a GPU.
        nvtx = torch.cuda.nvtx.range(name) if self._on_gpu else contextlib.nullcontext()
        try:
            with torch.profiler.record_function(name), nvtx:
                yield
        finally:
            self.since = time.monotonic()
            self._seconds[name] = self._seconds.get(name, 0.0) + self.since - began
            self.current = "between" if outer == "start" else outer

    def take_seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call, those of a phase within another in both."""
        seconds, self._seconds = self._seconds, {}
        return seconds
