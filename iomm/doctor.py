"""`iomm doctor`: what this machine has, what a run here would use, and what is not usable and why.

Looks without importing: packages by their metadata, GPUs by NVIDIA's driver tool, so it answers in a second.
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
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import Requirement

import iomm_kernels
from iomm_kernels import build

GIB = 2**30
INSTALL = "pip install -e ."
CUDA_EXTRA = "pip install -e '.[cuda]'"
DISTRIBUTIONS = (
    "torch", "triton", "megatron-core", "transformers", "diffusers", "safetensors", "sentencepiece", "numpy",
    "pillow", "wandb", "transformer-engine", "transformer-engine-torch", "transformer-engine-cu12",
    "transformer-engine-cu13", "flash-attn", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "apex",
    "nvidia-resiliency-ext",
)  # fmt: skip
SHOWN = ("torch", "megatron-core", "transformers", "diffusers", "triton", "numpy", "pillow", "wandb")
TE_PARTS = ("transformer-engine", "transformer-engine-torch")
TE_LIBRARIES = ("transformer-engine-cu12", "transformer-engine-cu13")  # one of them
APEX_ADDS = {  # by the compiled modules of NVIDIA's apex
    "amp_C": "a fused Adam",
    "fused_weight_gradient_mlp_cuda": "weight gradients summed within the matrix product",
}
MODULES = tuple(APEX_ADDS)

Status = Literal["info", "ok", "no", "broken"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the answer."""

    section: str
    name: str
    status: Status  # "no": not usable here, which may be all right; "broken": stands in the way of a run
    detail: str
    fix: str = ""  # the command or the change that helps


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
    unmet: tuple[str, ...]  # requirements of iomm that are not met


def collect(machine: Machine | None = None) -> list[Check]:
    """All checks, in the order in which they are shown.

    Args:
        machine: what to judge; None looks at this one.
    """
    machine = machine or look()
    parts = (_hardware, _packages, _backends, _kernels, _others, _choice)
    return [check for part in parts for check in part(machine)]


def render(checks: list[Check]) -> str:
    """Plain text, one line a check under its section; what helps stands on a line of its own."""
    marks = {"info": "    ", "ok": "ok  ", "no": "no  ", "broken": "BAD "}
    width = max((len(c.name) for c in checks), default=0)
    lines: list[str] = []
    section = None
    for check in checks:
        if check.section != section:
            section = check.section
            lines += [*([""] if lines else []), section]
        lines.append(f"  {marks[check.status]}{check.name:<{width}}  {check.detail}".rstrip())
        if check.fix:
            lines.append(f"      {'':<{width}}  -> {check.fix}")
    return "".join(f"{line}\n" for line in lines)


def look() -> Machine:
    """Look at this machine."""
    gpus = _gpus()
    return Machine(
        gpus=gpus,
        torch_cuda=_torch_cuda() if gpus else None,
        versions={name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None},
        modules=frozenset(name for name in MODULES if importlib.util.find_spec(name) is not None),
        uncompiled={"cpu": build.CPU.stale(), "cuda": build.CUDA.stale()},
        unmet=tuple(_unmet()),
    )


def _hardware(machine: Machine) -> Iterator[Check]:
    def info(name: str, detail: str) -> Check:
        return Check(section="machine", name=name, status="info", detail=detail)

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    yield info("python", f"{platform.python_version()}, {platform.system()} {platform.release()}")
    yield info("CPU", f"{_cpu_name()}, {cores()} cores usable of {os.cpu_count()}")
    yield info("memory", f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}")
    yield info("disk", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} in the working folder")
    if not machine.gpus:
        yield info("GPU", "none that NVIDIA's driver knows")
    for number, gpu in enumerate(machine.gpus):
        capability = f"compute capability {gpu.compute_capability}, driver {gpu.driver}"
        yield info(f"GPU {number}", f"{gpu.name}, {gpu.memory_gib:.0f} GiB, {capability}")


def _packages(machine: Machine) -> Iterator[Check]:
    for name in SHOWN:
        version = machine.versions.get(name)
        yield Check(section="packages", name=name, status="info", detail=version or "not installed")
    for text in machine.unmet:
        yield Check(section="packages", name="requirement", status="broken", detail=text, fix=INSTALL)
    if machine.torch_cuda is not None:
        detail, fix = machine.torch_cuda, "install the CUDA build of torch that fits the driver"
        yield Check(section="packages", name="torch and GPU", status="broken", detail=detail, fix=fix)
    resiliency = machine.versions.get("nvidia-resiliency-ext")
    if resiliency is not None and _release(resiliency) < (0, 6):
        yield Check(
            section="packages",
            name="nvidia-resiliency-ext",
            status="broken",
            detail=f"{resiliency} keeps Megatron-Core from importing its checkpoint strategy",
            fix="pip uninstall nvidia-resiliency-ext, or install 0.6 or newer",
        )


def _backends(machine: Machine) -> Iterator[Check]:
    section = "layers (parallel.backend)"
    if missing := [name for name in ("torch", "megatron-core") if name not in machine.versions]:
        detail = f"needs {' and '.join(missing)}"
        yield Check(section=section, name="local", status="broken", detail=detail, fix=INSTALL)
    else:
        detail = f"Megatron-Core {machine.versions['megatron-core']}"
        yield Check(section=section, name="local", status="ok", detail=detail)
    detail, fix = _transformer_engine(machine)
    status = "ok" if _usable_te(machine) else "no"
    detail += "; iomm's layers of it have not yet run on a GPU" if status == "ok" else ""
    yield Check(section=section, name="te", status=status, detail=detail, fix=fix)
    yield _fp8(machine)


def _usable_te(machine: Machine) -> bool:
    return _usable_gpu(machine) and len(_te_packages(machine)) >= 3


def _te_packages(machine: Machine) -> list[str]:
    """Those of Transformer Engine's that are here; a library counts once."""
    parts = [name for name in TE_PARTS if name in machine.versions]
    return parts + [name for name in TE_LIBRARIES if name in machine.versions][:1]


def _fp8(machine: Machine) -> Check:
    """Whether fp8.recipe means 8 bits or an emulation here."""
    capability: tuple[int, ...] = min((_release(gpu.compute_capability) for gpu in machine.gpus), default=())
    if not _usable_te(machine):
        status, detail = "no", "needs te; the local layers emulate its numbers, slower than without it"
    elif capability < (8, 9):
        detail = f"needs compute capability 8.9, this GPU has {'.'.join(map(str, capability))}; "
        status, detail = "no", detail + "parallel.backend=local emulates it"
    elif capability < (9, 0):
        status, detail = "ok", "delayed and current; blockwise needs compute capability 9.0"
    else:
        status, detail = "ok", "delayed and current; blockwise with CUDA 12.9 or newer"
    return Check(section="layers (parallel.backend)", name="fp8", status=status, detail=detail)


def _transformer_engine(machine: Machine) -> tuple[str, str]:
    """What is here of Transformer Engine, and what helps. All three of its packages must be, or none."""
    here = _te_packages(machine)
    if not here:
        return "Transformer Engine is not installed", CUDA_EXTRA if machine.gpus else ""
    if len(here) < 3:
        lacking = [name for name in TE_PARTS if name not in here]
        lacking += [] if set(here) & set(TE_LIBRARIES) else ["transformer-engine-cu13"]
        return f"Transformer Engine is installed without {' and '.join(lacking)}", CUDA_EXTRA
    installed = f"Transformer Engine {machine.versions['transformer-engine-torch']} is installed"
    if _usable_gpu(machine):
        return installed, ""
    none = "none that torch can use" if machine.gpus else "none"
    return f"{installed}; it needs a GPU, and {none} is here", ""


def _kernels(machine: Machine) -> Iterator[Check]:
    section, triton = "fused operators", machine.versions.get("triton")
    yield Check(section=section, name="eager", status="ok", detail="plain PyTorch, everywhere")
    count = f"{len(iomm_kernels.MODULES)} operators"
    if triton is None:
        detail = f"Triton, which {count} need, is not installed"
        fix = "pip install triton" if machine.gpus else ""
        yield Check(section=section, name="triton", status="no", detail=detail, fix=fix)
    elif not _usable_gpu(machine):
        detail = f"Triton {triton} is installed; its {count} need a GPU, and none is usable here"
        yield Check(section=section, name="triton", status="no", detail=detail)
    else:
        yield Check(section=section, name="triton", status="ok", detail=f"{count} by Triton {triton}")
    for device, problem in machine.uncompiled.items():
        detail = f"for {device} tensors: {'compiled' if problem is None else f'the library {problem}'}"
        yield Check(section=section, name="csrc", status="ok" if problem is None else "no", detail=detail)


def _usable_gpu(machine: Machine) -> bool:
    return bool(machine.gpus) and machine.torch_cuda is None


def _others(machine: Machine) -> Iterator[Check]:
    versions = machine.versions
    section = "image decoding"
    pillow = versions.get("pillow")
    yield Check(
        section=section,
        name="CPU",
        status="ok" if pillow else "broken",
        detail=f"Pillow {pillow}" if pillow else "Pillow is not installed",
        fix="" if pillow else INSTALL,
    )
    dali = versions.get("nvidia-dali-cuda130") or versions.get("nvidia-dali-cuda120")
    installed = f"DALI {dali} is installed" if dali else "DALI is not installed"
    detail = f"iomm does not use it yet. {installed}"
    yield Check(section=section, name="DALI", status="no", detail=detail)

    section = "optional"
    yield _flash_attention(machine)
    yield _apex(machine)


def _flash_attention(machine: Machine) -> Check:
    """What it adds beside Transformer Engine, whose attention chooses between it and cuDNN."""
    version = machine.versions.get("flash-attn")
    adds = "another kernel for te's attention to choose; on compute capability 9.0 it prefers cuDNN's"
    if version is None:
        status, detail = "no", f"not installed, and not needed: it is {adds}"
    elif _usable_te(machine):
        status, detail = "ok", f"{version}: {adds}"
    else:
        status, detail = "no", f"{version} is installed, and without te not used: it is {adds}"
    return Check(section="optional", name="flash-attn", status=status, detail=detail)


def _apex(machine: Machine) -> Check:
    """NVIDIA's apex, known by its compiled modules: the apex on PyPI is another project."""
    found = sorted(machine.modules)
    if found and _usable_te(machine):
        status, detail = "ok", f"NVIDIA's, with {', '.join(found)}; te has all of it and does not read it"
    elif found:
        adds = [APEX_ADDS[name] for name in found]
        status, detail = "ok", f"NVIDIA's; it gives the local layers {' and '.join(adds)} (on a GPU)"
    elif "apex" in machine.versions:
        status, detail = "no", "a package of this name is here, but not NVIDIA's with its extensions"
    else:
        status, detail = "no", "not installed, and not needed; te has all that the local layers would get"
    return Check(section="optional", name="apex", status=status, detail=detail)


def _choice(machine: Machine) -> Iterator[Check]:
    """What `auto` comes to."""
    device = "cuda, NCCL between ranks" if _usable_gpu(machine) else "cpu, gloo between ranks"
    if _usable_gpu(machine):
        operators = "triton" if "triton" in machine.versions else "eager"
    else:
        operators = "csrc, and eager where it has none" if machine.uncompiled["cpu"] is None else "eager"
    uses = {
        "device": device,
        "backend": "te (fp64: local)" if _usable_te(machine) else "local",
        "operators": operators,
        "decoder": "CPU",
    }
    for name, detail in uses.items():
        yield Check(section="a run on this machine uses", name=name, status="info", detail=detail)


def cores() -> int:
    """CPU cores this process may use: those it may be scheduled on, or fewer under a container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period, *_ = quota_file.read_text().split()
        if quota != "max":
            usable = min(usable, max(1, int(quota) // int(period)))
    return usable


def _cpu_name() -> str:
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


def _release(version: str) -> tuple[int, ...]:
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
