"""What a machine has. Looks without importing: packages by their metadata, GPUs by NVIDIA's driver tool.

Only where there is a GPU is torch imported, to ask whether it can use it.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from iomm_kernels import build

DISTRIBUTIONS = (
    "torch", "triton", "megatron-core", "transformers", "diffusers", "safetensors", "sentencepiece", "numpy",
    "pillow", "simplejpeg", "wandb", "transformer-engine", "transformer-engine-torch",
    "transformer-engine-cu12", "transformer-engine-cu13", "flash-attn", "nvidia-dali-cuda120",
    "nvidia-dali-cuda130", "apex", "nvidia-resiliency-ext",
)  # fmt: skip
TE_PARTS = ("transformer-engine", "transformer-engine-torch")
TE_LIBRARIES = ("transformer-engine-cu12", "transformer-engine-cu13")  # one of them
APEX_ADDS = {  # by the compiled modules of NVIDIA's apex
    "amp_C": "a fused Adam",
    "fused_weight_gradient_mlp_cuda": "weight gradients summed within the matrix product",
}
MODULES = tuple(APEX_ADDS)


class Gpu(NamedTuple):
    """One GPU as the driver names it."""

    name: str
    memory_gib: float
    compute_capability: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found. Apart from `collect`, so that tests can describe other machines."""

    gpus: tuple[Gpu, ...]
    torch_cuda: str | None  # why torch cannot use the GPUs; None where it can, or where there are none
    versions: Mapping[str, str]  # of the DISTRIBUTIONS that are installed
    modules: frozenset[str]  # of the MODULES that can be imported
    uncompiled: Mapping[
        str, str | None
    ]  # why csrc's library for a device is of no use; None if it can be used
    no_jpeg: str | None  # why the row-streaming JPEG decoder is of no use; None if it can be used
    unmet: tuple[str, ...]  # requirements of iomm that are not met


def look() -> Machine:
    """Look at this machine."""
    gpus = _gpus()
    return Machine(
        gpus=gpus,
        torch_cuda=_torch_cuda() if gpus else None,
        versions={name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None},
        modules=frozenset(name for name in MODULES if importlib.util.find_spec(name) is not None),
        uncompiled={"cpu": build.CPU.stale(), "cuda": build.CUDA.stale()},
        no_jpeg=build.JPEG.stale(),
        unmet=tuple(_unmet()),
    )


def usable_gpu(machine: Machine) -> bool:
    """Whether there is a GPU that torch can use."""
    return bool(machine.gpus) and machine.torch_cuda is None


def usable_te(machine: Machine) -> bool:
    """Whether Transformer Engine is whole and there is a GPU for it."""
    return usable_gpu(machine) and len(te_packages(machine)) >= 3


def te_packages(machine: Machine) -> list[str]:
    """Transformer Engine's packages that are here, three if it is whole."""
    parts = [name for name in TE_PARTS if name in machine.versions]
    return parts + [name for name in TE_LIBRARIES if name in machine.versions][:1]


def cores() -> int:
    """CPU cores this process may use: those it may be scheduled on, or fewer under a container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period, *_ = quota_file.read_text().split()
        if quota != "max":
            usable = min(usable, max(1, int(quota) // int(period)))
    return usable


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> tuple[Gpu, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    fields = "--query-gpu=name,memory.total,compute_cap,driver_version"
    query = [tool, fields, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # the tool without a driver behind it: no usable GPU
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return tuple(Gpu(row[0], _mib(row[1]) / 1024, row[2], row[3]) for row in rows if len(row) == 4)


def _mib(text: str) -> float:
    """Memory in MiB; 0 where the driver does not say ("[N/A]" on machines with shared memory)."""
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0


def _torch_cuda() -> str | None:
    """Why torch cannot use the GPUs that the driver shows; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build and does not see the GPU"
    if not torch.cuda.is_available():
        reasons = "the driver is too old for it, or CUDA_VISIBLE_DEVICES hides the GPU"
        return f"torch {torch.__version__} finds no usable CUDA device: {reasons}"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version, for comparison."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _unmet() -> Iterator[str]:
    """Requirements of iomm without its extras that are missing or out of range; iomm must be installed."""
    try:
        requirements = importlib.metadata.requires("iomm") or []
    except importlib.metadata.PackageNotFoundError:
        yield "iomm itself is not installed, so the versions of its requirements are not checked"
        return
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield f"{requirement.name} is not installed; iomm needs {requirement}"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is installed; iomm needs {requirement}"
