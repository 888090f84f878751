"""The CUDA half of csrc/ in the ahead-of-time gate: compiled and linked for sm_90a with nvcc, then read back.

`tools/kernels_gate.py` calls `csrc_gate`. Where nvcc or torch's headers are missing nothing is checked, and
the gate says so. With a CPU build of torch the link is against an empty stand-in for its CUDA library.
"""

import collections
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from iomm_kernels import build
from iomm_kernels.record import Compile

_WEIGHTS = 100_000_000  # of the EMA's statement: one launch takes what 320 blocks of 16,384 numbers hold
_PACKED, _ROWS, _SLOTS, _WIDTH = (
    2970,
    3264,
    64 * 264,
    2 * 1536,
)  # rows that count, all rows, slots, bytes of a row


_NOTHING = Compile(
    name="",
    kernel=None,
    signature={},
    constexprs={},
    aligned=(),
    num_warps=8,
    min_occupancy=0.5,
    streaming=True,
    bytes_min=0,
    bytes_actual=0,
)


def _kernel(name: str, bytes_moved: int, warps: int, **changes: Any) -> Compile:
    moved = {"bytes_min": bytes_moved, "bytes_actual": bytes_moved}
    return replace(_NOTHING, name=name, num_warps=warps, **moved, **changes)


# A kernel's name -> what it has to be. Kernels that are not here are the slower ways for rows that are no
# multiple of 16 bytes; they only must not spill.
SHIPPED = {
    "take_kernel<uint4, true>": _kernel(
        "csrc pack_rows", (_PACKED + _ROWS) * _WIDTH + 4 * _ROWS, 4, scalars=1
    ),
    "take_kernel<uint4, false>": _kernel(
        "csrc take_rows", (_PACKED + _SLOTS) * _WIDTH + 4 * _SLOTS, 4, scalars=1
    ),
    "index_kernel": _kernel(
        "csrc pack_index", 64 * (4 + 256 * 65 // 2) + 4 * (65 + _ROWS + _SLOTS + 1), 8, streaming=False
    ),
    "ema_kernel<float, true>": _kernel("csrc ema_update fp32", 12 * _WEIGHTS, 8),
    "ema_kernel<__nv_bfloat16, true>": _kernel("csrc ema_update bf16", 10 * _WEIGHTS, 8),
    "ema_kernel<__half, true>": _kernel("csrc ema_update fp16", 10 * _WEIGHTS, 8),
}


def csrc_gate(folder: Path, judge: Callable[..., Any], cuobjdump: Path) -> tuple[list[Any], str | None]:
    """Rows of all CUDA kernels, and why nothing was checked (None if it was).

    Args:
        folder: the library is built there; an unchanged one is not built again.
        judge: (statement, resources, instructions, shared bytes, target) -> row.
        cuobjdump: NVIDIA's tool.
    Raises:
        RuntimeError: the compiler failed, or a kernel of `SHIPPED` is not in the library.
    """
    if problem := build.CUDA.problem():
        return [], f"csrc/*.cu is not checked: it {problem}"
    folder.mkdir(parents=True, exist_ok=True)
    library = build.build(build.CUDA, folder)
    rows = []
    found = set()
    for mangled, (target, resources, instructions) in _read(library, cuobjdump).items():
        name = _demangled(mangled)
        found.add(name)
        statement = SHIPPED.get(name) or _kernel(f"csrc {name}", 0, 8, streaming=False, min_occupancy=0.25)
        rows.append(judge(statement, resources, instructions, resources["SHARED"], target))
    if missing := set(SHIPPED) - found:
        raise RuntimeError(f"{library} has no kernel {', '.join(sorted(missing))}: rename it in SHIPPED too.")
    order = {statement.name: i for i, statement in enumerate(SHIPPED.values())}
    return sorted(rows, key=lambda row: (order.get(row.name, len(order)), row.name)), None


def _read(library: Path, cuobjdump: Path) -> dict[str, tuple[str, dict[str, int], collections.Counter[str]]]:
    """Target, resources and instruction counts of each kernel, by its mangled name."""
    usage, code = (
        subprocess.run(
            [str(cuobjdump), flag, "-arch", "sm_90a", str(library)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for flag in ("-res-usage", "-sass")
    )
    resources = {
        name: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\n(.*)", usage)
    }
    kernels = {}
    for part in re.split(r"(?=\.target\s)", code):
        target = re.match(r"\.target\s+(\S+)", part)
        for body in part.split("Function : ")[1:]:
            found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", body)
            name = body.split(None, 1)[0]
            kernels[name] = target and f".target {target[1]}", resources[name], collections.Counter(found)
    return kernels


def _demangled(name: str) -> str:
    """Name and template arguments alone."""
    done = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\w+(?:<[^>]*>)?)\(", done.replace("(anonymous namespace)", ""))
    return found[1] if found else done.strip()
