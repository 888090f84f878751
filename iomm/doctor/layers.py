"""Which layers a model can be built from here, whether FP8 is real or emulated, and what flash-attn and apex
add."""

from collections.abc import Iterator

from iomm.doctor.check import CUDA_EXTRA, INSTALL, Check
from iomm.doctor.machine import (
    APEX_ADDS,
    TE_LIBRARIES,
    TE_PARTS,
    Machine,
    release,
    te_packages,
    usable_gpu,
    usable_te,
)


def backends(machine: Machine) -> Iterator[Check]:
    section = "layers (parallel.backend)"
    if missing := [name for name in ("torch", "megatron-core") if name not in machine.versions]:
        detail = f"needs {' and '.join(missing)}"
        yield Check(section=section, name="local", status="broken", detail=detail, fix=INSTALL)
    else:
        detail = f"Megatron-Core {machine.versions['megatron-core']}"
        yield Check(section=section, name="local", status="ok", detail=detail)
    detail, fix = _transformer_engine(machine)
    status = "ok" if usable_te(machine) else "no"
    detail += "; iomm's layers of it have not yet run on a GPU" if status == "ok" else ""
    yield Check(section=section, name="te", status=status, detail=detail, fix=fix)
    yield _fp8(machine)


def _fp8(machine: Machine) -> Check:
    """Whether fp8.recipe means 8 bits or an emulation here."""
    capability: tuple[int, ...] = min((release(gpu.compute_capability) for gpu in machine.gpus), default=())
    if not usable_te(machine):
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
    here = te_packages(machine)
    if not here:
        return "Transformer Engine is not installed", CUDA_EXTRA if machine.gpus else ""
    if len(here) < 3:
        lacking = [name for name in TE_PARTS if name not in here]
        lacking += [] if set(here) & set(TE_LIBRARIES) else ["transformer-engine-cu13"]
        return f"Transformer Engine is installed without {' and '.join(lacking)}", CUDA_EXTRA
    installed = f"Transformer Engine {machine.versions['transformer-engine-torch']} is installed"
    if usable_gpu(machine):
        return installed, ""
    none = "none that torch can use" if machine.gpus else "none"
    return f"{installed}; it needs a GPU, and {none} is here", ""


def flash_attention(machine: Machine) -> Check:
    """What it adds: to the adapter's attention, and to Transformer Engine's, which chooses by itself."""
    version = machine.versions.get("flash-attn")
    adds = "a kernel for the adapter's attention in mask mode drop, and for te's to choose"
    if version is None:
        status, detail = "no", f"not installed, and not needed: it is {adds}"
    elif machine.gpus:
        status, detail = "ok", f"{version}: {adds}"
    else:
        status, detail = "no", f"{version} is installed, and without a GPU not used: it is {adds}"
    return Check(section="optional", name="flash-attn", status=status, detail=detail)


def apex(machine: Machine) -> Check:
    """NVIDIA's apex, known by its compiled modules: the apex on PyPI is another project."""
    found = sorted(machine.modules)
    if found and usable_te(machine):
        status, detail = "ok", f"NVIDIA's, with {', '.join(found)}; te has all of it and does not read it"
    elif found:
        adds = [APEX_ADDS[name] for name in found]
        status, detail = "ok", f"NVIDIA's; it gives the local layers {' and '.join(adds)} (on a GPU)"
    elif "apex" in machine.versions:
        status, detail = "no", "a package of this name is here, but not NVIDIA's with its extensions"
    else:
        status, detail = "no", "not installed, and not needed; te has all that the local layers would get"
    return Check(section="optional", name="apex", status=status, detail=detail)
