"""`iomm doctor`: what this machine has, what a run here would use, and what is not usable and why.

It answers in a second, because it imports next to nothing (`machine`).
"""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

import iomm_kernels
from iomm.doctor.check import CUDA_EXTRA, INSTALL, Check
from iomm.doctor.layers import apex, backends, flash_attention
from iomm.doctor.machine import Gpu, Machine, cores, cpu_name, look, release, usable_gpu, usable_te

__all__ = ["Check", "Gpu", "Machine", "collect", "render"]

GIB = 2**30
SHOWN = ("torch", "megatron-core", "transformers", "diffusers", "triton", "numpy", "pillow", "wandb")


def collect(machine: Machine | None = None) -> list[Check]:
    """All checks, in the order in which they are shown.

    Args:
        machine: what to judge; None looks at this one.
    """
    machine = machine or look()
    parts = (_hardware, _packages, backends, _kernels, _others, _choice)
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


def _hardware(machine: Machine) -> Iterator[Check]:
    def info(name: str, detail: str) -> Check:
        return Check(section="machine", name=name, status="info", detail=detail)

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    yield info("python", f"{platform.python_version()}, {platform.system()} {platform.release()}")
    yield info("CPU", f"{cpu_name()}, {cores()} cores usable of {os.cpu_count()}")
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
    if resiliency is not None and release(resiliency) < (0, 6):
        yield Check(
            section="packages",
            name="nvidia-resiliency-ext",
            status="broken",
            detail=f"{resiliency} keeps Megatron-Core from importing its checkpoint strategy",
            fix="pip uninstall nvidia-resiliency-ext, or install 0.6 or newer",
        )


def _kernels(machine: Machine) -> Iterator[Check]:
    section, triton = "fused operators", machine.versions.get("triton")
    yield Check(section=section, name="eager", status="ok", detail="plain PyTorch, everywhere")
    count = f"{len(iomm_kernels.MODULES)} operators"
    if triton is None:
        detail = f"Triton, which {count} need, is not installed"
        fix = "pip install triton" if machine.gpus else ""
        yield Check(section=section, name="triton", status="no", detail=detail, fix=fix)
    elif not usable_gpu(machine):
        detail = f"Triton {triton} is installed; its {count} need a GPU, and none is usable here"
        yield Check(section=section, name="triton", status="no", detail=detail)
    else:
        yield Check(section=section, name="triton", status="ok", detail=f"{count} by Triton {triton}")
    for device, problem in machine.uncompiled.items():
        detail = f"for {device} tensors: {'compiled' if problem is None else f'the library {problem}'}"
        yield Check(section=section, name="csrc", status="ok" if problem is None else "no", detail=detail)


def _others(machine: Machine) -> Iterator[Check]:
    versions = machine.versions
    section = "image decoding"
    needed = {"Pillow": versions.get("pillow"), "simplejpeg": versions.get("simplejpeg")}
    missing = [name for name, version in needed.items() if version is None]
    yield Check(
        section=section,
        name="CPU",
        status="broken" if missing else "ok",
        detail=f"{' and '.join(missing)} not installed"
        if missing
        else ", ".join(f"{name} {version}" for name, version in needed.items()),
        fix=INSTALL if missing else "",
    )
    yield Check(
        section=section,
        name="JPEG rows",
        status="ok" if machine.no_jpeg is None else "no",
        detail="csrc on libjpeg-turbo" if machine.no_jpeg is None else f"the library {machine.no_jpeg}",
    )
    if dali := _dali(machine):
        where = "its GPU decode is not yet run" if usable_gpu(machine) else "on the CPU; data.decode=dali"
        yield Check(section=section, name="DALI", status="ok", detail=f"DALI {dali}: {where}")
    else:
        detail, fix = "DALI is not installed", CUDA_EXTRA if machine.gpus else ""
        yield Check(section=section, name="DALI", status="no", detail=detail, fix=fix)

    section = "optional"
    yield flash_attention(machine)
    yield apex(machine)


def _dali(machine: Machine) -> str | None:
    """Version of NVIDIA DALI, if it is installed."""
    return machine.versions.get("nvidia-dali-cuda130") or machine.versions.get("nvidia-dali-cuda120")


def _choice(machine: Machine) -> Iterator[Check]:
    """What `auto` comes to."""
    device = "cuda, NCCL between ranks" if usable_gpu(machine) else "cpu, gloo between ranks"
    if usable_gpu(machine):
        operators = "triton" if "triton" in machine.versions else "eager"
    else:
        operators = "csrc, and eager where it has none" if machine.uncompiled["cpu"] is None else "eager"
    uses = {
        "device": device,
        "backend": "te (fp64: local)" if usable_te(machine) else "local",
        "operators": operators,
        "decoder": "DALI"
        if usable_gpu(machine) and _dali(machine)
        else f"CPU, JPEGs {'by simplejpeg and torch' if machine.no_jpeg else 'row by row'}",
    }
    for name, detail in uses.items():
        yield Check(section="a run on this machine uses", name=name, status="info", detail=detail)
