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
    folder = Path(os.environ.get("IOMM_CSRC_DIR") or build.HERE)
    if problem := library.stale(folder):
        return problem
    try:
        torch.ops.load_library(folder / library.file)
    except OSError as error:
        return f"does not load: {error.__cause__ or error}"
    return None
