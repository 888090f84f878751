"""tools/csrc_gate.py: the CUDA half of the ahead-of-time gate, on the library that `make kernels` built."""

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from iomm_kernels import build

TOOLS = Path(__file__).parents[2] / "tools"
BUILT = build.HERE / build.CUDA.file
RECORD = build.HERE / f"{build.CUDA.file}.digest"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    return SimpleNamespace(**runpy.run_path(str(TOOLS / "kernels_gate.py")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if problem := build.CUDA.problem():
        pytest.skip(f"the CUDA library {problem}")
    if not RECORD.exists() or RECORD.read_text() != build.CUDA.digest():
        pytest.skip("the CUDA library is not built, or not from these sources: run `make kernels`")
    for path in (BUILT, RECORD):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_every_cuda_kernel_is_read_back_and_passes(gate: SimpleNamespace, folder: Path) -> None:
    rows, unchecked = gate.csrc_gate(folder, gate.judge_code, gate.tool("cuobjdump"))
    assert unchecked is None
    assert [row.name for row in rows[:3]] == ["csrc pack_rows", "csrc take_rows", "csrc pack_index"]
    assert [(row.name, row.problems) for row in rows if row.problems] == []
    assert all(row.registers > 0 for row in rows)
    assert all(row.wide_share == 1.0 for row in rows if row.name.startswith("csrc ema_update"))


def test_a_kernel_of_the_table_that_is_not_in_the_library_fails(
    gate: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = gate.csrc_gate.__globals__["SHIPPED"]
    monkeypatch.setitem(shipped, "renamed_kernel", shipped["index_kernel"])
    with pytest.raises(RuntimeError, match="has no kernel renamed_kernel: rename it in SHIPPED too"):
        gate.csrc_gate(folder, gate.judge_code, gate.tool("cuobjdump"))


def test_without_nvcc_nothing_is_checked_and_the_gate_says_so(
    gate: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", "no-such-compiler")
    rows, unchecked = gate.csrc_gate(tmp_path, gate.judge_code, Path("unused"))
    assert rows == []
    assert unchecked.startswith("csrc/*.cu is not checked: it needs a compiler 'no-such-compiler'")
