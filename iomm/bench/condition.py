"""What the benchmarks of the condition share: a random MLLM, one training pass through it, and a fair
comparison of several such passes.
"""

import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from iomm.conditioning.conditioner import Conditioner
from iomm.conditioning.mllm import FrozenMllm, open_mllm
from iomm.conditioning.prefix import PaddedPrefix, Prefix
from iomm.conditioning.random_mllm import save_random_internvl
from iomm.config import ConditionConfig, ConnectorConfig, MllmConfig

PATCH_TOKENS, TEXT_TOKENS, QUERIES = 256, 12, 256


@dataclass(frozen=True)
class Compared:
    """Medians by pass."""

    time_ms: dict[str, float]
    peak_mib: dict[str, float]  # above what was held before the pass

    def lines(self, what: str) -> list[str]:
        """A table, its heading ended by `what` was measured."""
        lines = [f"{'':8}{'median ms':>12}{'peak MiB':>12}   ({what})"]
        return lines + [f"{n:8}{self.time_ms[n]:12.1f}{self.peak_mib[n]:12.1f}" for n in self.time_ms]


def random_mllm(width: int, layers: int) -> FrozenMllm:
    """A random InternVL of this size, on the GPU if there is one.

    Raises:
        ValueError: a width that is not a multiple of 64, or no layers.
    """
    if width % 64 or min(width, layers) < 1:
        raise ValueError(f"width {width} must be a multiple of 64, and layers at least 1.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        save_random_internvl(Path(folder), width=width, layers=layers, image_tokens=PATCH_TOKENS)
        return open_mllm(MllmConfig(path=folder), torch.float32, device)


def random_prefix(mllm: FrozenMllm, batch: int) -> PaddedPrefix:
    """Rows of text and patches that all count."""
    rows = TEXT_TOKENS + PATCH_TOKENS
    torch.manual_seed(0)
    c_BPD = torch.randn(batch, rows, mllm.width, device=mllm.device)
    position_BPA = torch.arange(rows, device=mllm.device)[:, None].expand(batch, -1, -1)
    attend_BP = torch.ones(batch, rows, dtype=torch.bool, device=mllm.device)
    return PaddedPrefix(c_BPD, attend_BP, position_BPA, attend_BP.sum(1))


def training_pass(mllm: FrozenMllm, prefix: Callable[[], Prefix], split: bool = True) -> Callable[[], None]:
    """Forward and backward through adapter and MLLM."""
    torch.manual_seed(0)
    config = ConditionConfig(
        queries=QUERIES,
        adapter_heads=mllm.width // 64,
        prefix_split=split,
        connector=ConnectorConfig(kind="linear"),
    )
    conditioner = Conditioner(config, mllm.width, mllm.width).to(mllm.device)
    torch.nn.init.normal_(conditioner.adapter.queries)  # pyright: ignore[reportOptionalMemberAccess]

    def run() -> None:
        conditioner.zero_grad()
        condition_BTE, _ = conditioner(mllm, prefix())
        condition_BTE.square().mean().backward()
        if mllm.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def compare(passes: Mapping[str, Callable[[], None]], repeats: int, device: torch.device) -> Compared:
    """Time and peak memory of each, taken in turn, so that a slow moment of the machine meets all.

    Raises:
        ValueError: no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats} must be at least 1.")
    for run in passes.values():
        run()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    peaks: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, run in passes.items():
            took, peak = _measure(run, device)
            seconds[name].append(took)
            peaks[name].append(peak)
    time_ms = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return Compared(time_ms, {name: statistics.median(values) for name, values in peaks.items()})


def _measure(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds, and peak memory in MiB above what was held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # Linux: the high-water mark starts again at what is held now
        before = _high_water_bytes()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _high_water_bytes()
    return seconds, (peak - before) / 2**20


def _high_water_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def device_name(device: torch.device) -> str:
    """What the figures were taken on."""
    return (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
