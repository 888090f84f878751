"""iomm doctor on this machine, and on machines described to it."""

import dataclasses
from pathlib import Path

import pytest

import iomm_kernels
from iomm.cli import main
from iomm.doctor import Check, Gpu, Machine, collect, render
from iomm.doctor.machine import _gpus
from iomm.parallel.mesh import Mesh

VERSIONS = {
    "torch": "2.14.1",
    "megatron-core": "0.19.2",
    "pillow": "13.0.0",
    "simplejpeg": "1.9.0",
    "triton": "3.8.0",
}
H100 = Gpu("NVIDIA H100 80GB HBM3", 79.6, "9.0", "580.10")
TE = dict.fromkeys(("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"), "2.20.2")
NOT_BUILT = {"cpu": "is not built (make kernels)", "cuda": "is not built (make kernels)"}
CPU_ONLY = Machine(
    gpus=(),
    torch_cuda=None,
    versions=VERSIONS,
    modules=frozenset(),
    uncompiled=NOT_BUILT,
    no_jpeg="is not built (make kernels)",
    unmet=(),
)


def check(name: str, machine: Machine = CPU_ONLY, **changes: object) -> Check:
    return [c for c in collect(dataclasses.replace(machine, **changes)) if c.name == name][-1]


def test_this_machine_can_run_the_local_backend() -> None:
    checks = collect()
    assert [c.status for c in checks if c.name == "local"] == ["ok"]
    assert not [c.detail for c in checks if c.name == "requirement" and "iomm needs" in c.detail]
    assert "a run on this machine uses" in render(checks)


def test_a_machine_without_a_gpu_runs_on_cpu_and_says_why_te_is_not_usable() -> None:
    assert check("device").detail.startswith("cpu")
    assert check("te").status == "no"
    assert "not installed" in check("te").detail
    assert "it needs a GPU, and none is here" in check("te", versions=VERSIONS | TE).detail


def test_a_gpu_is_named_and_used() -> None:
    assert "H100 80GB HBM3, 80 GiB, compute capability 9.0" in check("GPU 0", gpus=(H100,)).detail
    assert check("device", gpus=(H100,)).detail.startswith("cuda")
    assert check("te", gpus=(H100,)).fix == "pip install -e '.[cuda]'"


def test_a_gpu_that_torch_cannot_use_is_broken_and_the_run_is_on_cpu() -> None:
    reason = "torch 2.14.1+cpu is a CPU build and does not see the GPU"
    assert check("torch and GPU", gpus=(H100,), torch_cuda=reason).status == "broken"
    assert check("device", gpus=(H100,), torch_cuda=reason).detail.startswith("cpu")


def test_te_with_a_usable_gpu_is_what_auto_takes_and_says_that_it_has_not_run() -> None:
    machine = dataclasses.replace(CPU_ONLY, versions=VERSIONS | TE, gpus=(H100,))
    assert check("te", machine).status == "ok" and "not yet run on a GPU" in check("te", machine).detail
    assert check("backend", machine).detail.startswith("te")
    unusable = dataclasses.replace(machine, torch_cuda="torch is a CPU build")
    assert check("te", unusable).status == "no" and "none that torch can use" in check("te", unusable).detail
    assert check("backend", unusable).detail == check("backend").detail == "local"


def test_fp8_is_real_where_te_and_the_gpu_have_it_and_emulated_elsewhere() -> None:
    def on(capability: str) -> Check:
        gpu = H100._replace(compute_capability=capability)
        return check("fp8", versions=VERSIONS | TE, gpus=(gpu,))

    assert check("fp8").status == "no" and "emulate" in check("fp8").detail
    assert on("8.0").status == "no" and "this GPU has 8.0" in on("8.0").detail
    assert on("8.9").status == "ok" and "blockwise needs compute capability 9.0" in on("8.9").detail
    assert on("9.0").status == "ok" and "CUDA 12.9" in on("9.0").detail


def test_transformer_engine_installed_in_part_names_what_is_missing() -> None:
    part = {"transformer-engine": "2.20.2", "transformer-engine-cu13": "2.20.2"}
    assert "installed without transformer-engine-torch" in check("te", versions=VERSIONS | part).detail


def test_a_missing_requirement_is_broken_and_names_the_command() -> None:
    without = {"torch": "2.14.1"}
    assert check("local", versions=without).status == "broken"
    assert "megatron-core" in check("local", versions=without).detail
    assert check("requirement", unmet=("diffusers is not installed; iomm needs diffusers>=0.42",)).fix


def test_apex_from_the_package_index_is_not_taken_for_the_one_of_nvidia() -> None:
    assert "not NVIDIA's" in check("apex", versions=VERSIONS | {"apex": "0.9.10"}).detail
    assert check("apex", modules=frozenset({"amp_C"})).status == "ok"
    assert "not needed" in check("apex").detail


def test_what_flash_attention_and_apex_add_is_said_beside_te_and_without_it() -> None:
    found = {"modules": frozenset({"amp_C", "fused_weight_gradient_mlp_cuda"})}
    with_te = {"versions": VERSIONS | TE | {"flash-attn": "2.8.3"}, "gpus": (H100,)}
    assert "gradients summed within the matrix product" in check("apex", **found).detail
    assert "te has all of it" in check("apex", **found, **with_te).detail
    assert check("flash-attn", **with_te).status == "ok" and "mask mode drop" in check("flash-attn").detail
    assert "without a GPU not used" in check("flash-attn", versions=VERSIONS | {"flash-attn": "2.8.3"}).detail


def test_an_old_resiliency_extension_is_broken_and_a_newer_one_is_not_mentioned() -> None:
    name = "nvidia-resiliency-ext"
    assert check(name, versions=VERSIONS | {name: "0.4.1"}).status == "broken"
    newer = dataclasses.replace(CPU_ONLY, versions=VERSIONS | {name: "0.6.0"})
    assert name not in [c.name for c in collect(newer)]


def test_dali_decodes_where_a_gpu_is_and_can_be_asked_for_elsewhere() -> None:
    dali = VERSIONS | {"nvidia-dali-cuda130": "2.4.0"}
    on_cpu = "CPU, JPEGs by simplejpeg and torch"
    assert check("DALI").status == "no" and check("decoder").detail == on_cpu
    assert check("DALI", versions=dali).status == "ok" and check("decoder", versions=dali).detail == on_cpu
    assert check("decoder", versions=dali, gpus=(H100,)).detail == "DALI"
    without = {name: version for name, version in VERSIONS.items() if name != "simplejpeg"}
    assert check("CPU", versions=without).status == "broken"


def test_jpegs_are_decoded_row_by_row_where_that_is_built() -> None:
    assert (check("JPEG rows").status, check("JPEG rows").detail) == (
        "no",
        "the library is not built (make kernels)",
    )
    assert check("JPEG rows", no_jpeg=None).status == "ok"
    assert check("decoder", no_jpeg=None).detail == "CPU, JPEGs row by row"


def test_the_driver_is_asked_for_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("NVIDIA H100 80GB HBM3, 81559, 9.0, 580.10", "NVIDIA GB10, [N/A], 12.1, 580.10")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    first, second = _gpus()
    assert first._replace(memory_gib=round(first.memory_gib, 1)) == H100
    assert second.memory_gib == 0


def test_a_driver_tool_that_fails_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert _gpus() == ()


def test_triton_operators_are_usable_where_triton_and_a_gpu_are() -> None:
    assert check("triton").status == "no"
    assert "need a GPU" in check("triton").detail
    assert check("triton", gpus=(H100,)).status == "ok"
    assert f"{len(iomm_kernels.MODULES)} operators by Triton 3.8.0" in check("triton", gpus=(H100,)).detail
    without = {name: version for name, version in VERSIONS.items() if name != "triton"}
    assert check("triton", gpus=(H100,), versions=without).fix == "pip install triton"


def test_compiled_operators_are_used_on_cpu_where_they_are_built() -> None:
    assert check("csrc").detail == "for cuda tensors: the library is not built (make kernels)"
    assert check("operators").detail == "eager"
    built = NOT_BUILT | {"cpu": None}
    assert [
        c.status for c in collect(dataclasses.replace(CPU_ONLY, uncompiled=built)) if c.name == "csrc"
    ] == ["ok", "no"]
    assert check("operators", uncompiled=built).detail == "csrc, and eager where it has none"
    assert check("operators", gpus=(H100,), uncompiled=built).detail == "triton"


def test_what_is_shown_is_one_line_a_check_and_the_fix_below_it() -> None:
    lines = render([Check(section="s", name="a", status="no", detail="why", fix="do this")]).splitlines()
    assert lines == ["s", "  no  a  why", "         -> do this"]


def test_ranks_are_compared_when_there_is_one_and_how_to_compare_more_is_said(
    mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--distributed"]) == 0
    shown = capsys.readouterr().out
    assert "it has" in shown and "torch: " in shown and "code: " in shown
    assert "a sum over all 1 ranks" in shown and "torchrun --nproc-per-node=8" in shown


def test_settings_are_compared_among_ranks_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", "run.py"]) == 1
    assert "add --distributed" in capsys.readouterr().err
