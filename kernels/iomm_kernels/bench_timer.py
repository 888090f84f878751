"""How long a call takes on a device, and what the device can do at best."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

FLUSH_BYTES = 256 * 2**20  # more than the 50 MB of an H800's L2

Call = Callable[[], object]


class Timer:
    """Milliseconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
        )

    def __call__(self, call: Call) -> float:
        if self._flush is None:
            began = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - began)
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def in_turn(self, calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
        """Times of each call, the calls taken in turn."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(self(call))
        return times


def ceilings(timer: Timer, dtypes: Sequence[torch.dtype]) -> list[float]:
    """GB/s of a copy, then TFLOP/s of a matrix product in each dtype."""
    products = [_matmul_ceiling(timer, timer.device, dtype) for dtype in dtypes]
    return [_copy_ceiling(timer, timer.device), *products]


def _copy_ceiling(timer: Timer, device: torch.device) -> float:
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    times = timer.in_turn({"copy": lambda: target.copy_(source)}, 11)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(times) / 1e6


def _matmul_ceiling(timer: Timer, device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    times = timer.in_turn({"matmul": lambda: a @ b}, 11)["matmul"]
    return 2 * side**3 / statistics.median(times) / 1e9
