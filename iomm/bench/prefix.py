"""`iomm bench prefix`: the frozen-prefix split against the naive full pass (method.md, "The frozen prefix is
free").

By FLOPs, with P prefix positions and Q queries, the naive pass runs P + Q rows forward and their input
gradients backward, 2 (P + Q); the split runs P rows forward and Q rows both ways, P + 2 Q. It also keeps no
activations of the P rows.
"""

import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from iomm.conditioning.conditioner import Conditioner
from iomm.conditioning.mllm import FrozenMllm, Prefix, open_mllm
from iomm.conditioning.random_mllm import save_random_internvl
from iomm.config import ConditionConfig, ConnectorConfig, MllmConfig

PATCH_TOKENS, TEXT_TOKENS, QUERIES = 256, 12, 256


def bench_prefix(width: int, layers: int, batch: int, repeats: int) -> str:
    """Time and peak memory of forward and backward through adapter and MLLM, as a table and a line of JSON.

    Raises:
        ValueError: a width that is not a multiple of 64, or sizes below 1.
    """
    if width % 64 or min(width, layers, batch, repeats) < 1:
        raise ValueError(f"width {width} must be a multiple of 64, and layers, batch and repeats at least 1.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        save_random_internvl(Path(folder), width=width, layers=layers, image_tokens=PATCH_TOKENS)
        mllm = open_mllm(MllmConfig(path=folder), torch.float32, device)
    prefix = _prefix(mllm, batch)
    passes = {name: _pass(mllm, prefix, split) for name, split in (("naive", False), ("split", True))}
    for run in passes.values():
        run()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    peaks: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):  # taken in turn, so that a slow moment of the machine meets both
        for name, run in passes.items():
            took, peak = _measure(run, device)
            seconds[name].append(took)
            peaks[name].append(peak)
    time_ms = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    peak_mib = {name: statistics.median(values) for name, values in peaks.items()}
    rows = prefix.c_BPD.shape[1]
    record = {
        "bench": "prefix",
        "device": _device_name(device),
        "width": width,
        "layers": layers,
        "batch": batch,
        "prefix": rows,
        "queries": QUERIES,
        "time_ms": time_ms,
        "peak_mib": peak_mib,
        "time_ratio": time_ms["naive"] / time_ms["split"],
        "peak_ratio": peak_mib["naive"] / peak_mib["split"],
        "predicted_time_ratio": 2 * (rows + QUERIES) / (rows + 2 * QUERIES),
    }
    lines = [
        f"{'':8}{'median ms':>12}{'peak MiB':>12}   (forward and backward, batch {batch}, prefix "
        f"{rows}, queries {QUERIES})"
    ]
    lines += [f"{name:8}{time_ms[name]:12.1f}{peak_mib[name]:12.1f}" for name in passes]
    lines.append(
        f"split is {record['time_ratio']:.2f}x faster (by FLOPs {record['predicted_time_ratio']:.2f}x) "
        f"and needs {record['peak_ratio']:.2f}x less memory above the weights"
    )
    return "\n".join((*lines, json.dumps(record), ""))


def _prefix(mllm: FrozenMllm, batch: int) -> Prefix:
    rows = TEXT_TOKENS + PATCH_TOKENS
    torch.manual_seed(0)
    c_BPD = torch.randn(batch, rows, mllm.width, device=mllm.device)
    position_BPA = torch.arange(rows, device=mllm.device)[:, None].expand(batch, -1, -1)
    attend_BP = torch.ones(batch, rows, dtype=torch.bool, device=mllm.device)
    return Prefix(c_BPD, attend_BP, position_BPA, attend_BP.sum(1))


def _pass(mllm: FrozenMllm, prefix: Prefix, split: bool) -> Callable[[], None]:
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
        condition_BTE, _ = conditioner(mllm, prefix)
        condition_BTE.square().mean().backward()
        if mllm.device.type == "cuda":
            torch.cuda.synchronize()

    return run


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


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
