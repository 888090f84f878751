"""tools/kernels_gate.py: it fails on kernels that deserve it."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from iomm_kernels.launch import jit, tl
from iomm_kernels.record import Compile

PATH = Path(__file__).parents[2] / "tools" / "kernels_gate.py"


@pytest.fixture(scope="module")
def gate() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PATH)))


@jit
def every_second_number_less_the_sum(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    number = tl.load(x + 2 * at)
    tl.store(y + 2 * at, number - tl.sum(number))


@jit
def copy(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))


GOOD = Compile(
    name="copy",
    kernel=copy,
    signature={"x": "*fp32", "y": "*fp32"},
    constexprs={"N": 1024},
    aligned=("x", "y"),
    num_warps=4,
    min_occupancy=1.0,
    streaming=True,
    bytes_min=8192,
    bytes_actual=8192,
)


def test_a_good_kernel_passes_and_is_measured(gate: SimpleNamespace) -> None:
    row = gate.judge(GOOD)
    assert row.problems == []
    assert row.wide_share == 1.0
    assert row.spill_bytes == 0
    assert 0 < row.registers <= 32
    assert row.predicted_us == pytest.approx(8192 / 3.35e6)


def test_a_kernel_that_spills_and_reads_every_second_number_fails_for_each_reason(
    gate: SimpleNamespace,
) -> None:
    changes = {"kernel": every_second_number_less_the_sum, "constexprs": {"N": 16384}, "num_warps": 1}
    problems = " ".join(gate.judge(replace(GOOD, **changes, min_occupancy=0.5, dot=True)).problems)
    assert "spills (" in problems
    assert "is streaming, but only 0% of its row accesses are 128 bits wide; 95% is the bound" in problems
    assert "0.5 is its bound" in problems
    assert "has no tensor-core instruction" in problems


def test_lengths_without_alignment_and_understated_bytes_fail(gate: SimpleNamespace) -> None:
    problems = gate.judge(replace(GOOD, aligned=(), bytes_actual=8191)).problems
    assert ["128 bits wide" in problem for problem in problems] == [True, False]
    assert problems[1] == "states 8191 bytes, less than its minimum 8192"


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "warps", "expected"),
    [
        (32, 0, 4, 1),
        (33, 0, 4, 0.75),
        (64, 0, 8, 0.5),
        (255, 0, 4, 0.125),
        (32, 113_000, 4, 0.125),
        (16, 0, 1, 0.5),
    ],
)
def test_occupancy_follows_registers_shared_memory_and_blocks(
    gate: SimpleNamespace, registers: int, shared_bytes: int, warps: int, expected: float
) -> None:
    assert gate.occupancy(registers, shared_bytes, warps) == expected


def test_the_command_writes_its_table_and_fails_with_the_reasons(
    gate: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = gate.Row(
        name="copy", registers=16, spill_bytes=0, shared_bytes=0, occupancy=1.0, wide_share=1.0,
        tensor_core=0, bytes_min=6_700_000, bytes_actual=6_700_000,
    )  # fmt: skip
    rows = [row]
    unchecked = "csrc: not checked, no nvcc"
    monkeypatch.setitem(gate.main.__globals__, "judge_all", lambda only, processes: list(rows))
    monkeypatch.setitem(gate.main.__globals__, "csrc_gate", lambda *_: ([], unchecked))
    assert gate.main(["--out", str(tmp_path)]) == 0
    assert "| copy | 16 | 0 | 0 | 1.00 | 100% | 0 | 6.7 | 1.00 | 2.0 |" in (tmp_path / "gate.md").read_text()
    rows.append(replace(row, name="bad", problems=["spills"]))
    assert gate.main(["--out", str(tmp_path)]) == 1
    assert f"{unchecked}\nbad: spills\n2 kernels, 1 problems" in capsys.readouterr().out
    assert [r["name"] for r in json.loads((tmp_path / "gate.json").read_text())] == ["copy", "bad"]


def test_a_word_that_no_kernel_has_in_its_name_is_an_error(gate: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="no shipped kernel has 'nothing' in its name"):
        gate.judge_all("nothing", 1)
