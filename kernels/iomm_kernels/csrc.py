"""Loads the compiled operators of csrc/, torch.ops.iomm_csrc.<name>, on first use.

`IOMM_CSRC_DIR` names another folder of built libraries than this package (tests build into one of theirs).
"""

import functools
import os
from pathlib import Path

import torch

from iomm_kernels import build

LIBRARIES = {"cpu": build.CPU, "cuda": build.CUDA}


def problem(name: str, device_type: str = "cpu") -> str | None:
    """Why torch.ops.iomm_csrc.<name> cannot be called with tensors of this device; None if it can."""
    if device_type not in LIBRARIES:
        return f"has no {device_type} operators"
    if unloaded := load_problem(device_type):
        return unloaded
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not hasattr(torch.ops.iomm_csrc, name) or not has_kernel(f"iomm_csrc::{name}", device_type.upper()):
        return f"has no compiled operator {name} for {device_type} tensors"
    return None


@functools.cache
def load_problem(device_type: str) -> str | None:
    """Load the library of "cpu" or "cuda" operators: why that failed, None if it did not."""
    library = LIBRARIES[device_type]
    path = Path(os.environ.get("IOMM_CSRC_DIR") or build.HERE) / library.file
    if not path.exists():
        return f"is not built: {path} is not there (run `make kernels`; it needs {library.compiler})"
    if library.sources() and _digest(path) != library.digest():
        return f"is older than its sources in {build.SOURCES} (run `make kernels`)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"does not load: {error.__cause__ or error}"
    return None


def _digest(path: Path) -> str:
    record = path.with_name(f"{path.name}.digest")
    return record.read_text() if record.exists() else "unknown"
