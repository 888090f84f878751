"""The benchmark as a user runs it, on shapes small enough for a test: 8 samples of 4 tokens of width 768."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from iomm_kernels import bench_cli, bench_report
from iomm_kernels.bench import PASSES, PROVIDERS, Request, Result, Row, Skipped, measure

TINY = Request(
    ops=("gated_residual",),
    presets=("cpu",),
    sides_px=(32,),
    dtypes=("fp32",),
    providers=("eager",),
    passes=("forward",),
    device="cpu",
    repeats=1,
)


def row(**changes: Any) -> Row:
    made = Row(
        op="modulate",
        preset="cpu",
        side_px=32,
        dtype="fp32",
        pass_name="both",
        provider="eager",
        median_ms=2.0,
        p20_ms=1.0,
        p80_ms=3.0,
        gb_per_s=1.5,
        tflop_per_s=None,
        percent_of_ceiling=10.0,
        faster_than={"csrc": 0.5},
    )
    return dataclasses.replace(made, **changes)


def result(*rows: Row, **changes: Any) -> Result:
    made = Result(
        device="CPU",
        torch="2.14",
        threads=1,
        repeats=3,
        copy_gb_per_s=15.0,
        matmul_tflop_per_s={"fp32": 0.1},
        rows=list(rows),
        skipped=[Skipped(what="modulate: te", why="is not installed")],
    )
    return dataclasses.replace(made, **changes)


def test_the_command_measures_shows_writes_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "--ops modulate,gated_residual --presets cpu --px 32 --providers eager,triton --passes forward,both"
    )
    fixed = f"{line} --device cpu --repeats 2".split()
    assert bench_cli.main([*fixed, "--out", str(tmp_path / "first")]) == 0
    old = tmp_path / "first" / "bench.json"
    assert bench_cli.main([*fixed, "--out", str(tmp_path / "second"), "--compare", str(old)]) == 0

    written = json.loads(old.read_text())
    measured = [(r["op"], r["pass_name"], r["provider"]) for r in written["rows"]]
    assert measured == [
        (op, p, "eager") for op in ("modulate", "gated_residual") for p in ("forward", "both")
    ]
    assert all(0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] for r in written["rows"])
    assert {gap["what"] for gap in written["skipped"]} == {"modulate: triton", "gated_residual: triton"}
    with (tmp_path / "first" / "bench.csv").open() as file:
        assert [r["op"] for r in csv.DictReader(file)] == [r["op"] for r in written["rows"]]
    assert (tmp_path / "first" / "bench.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "gated_residual cpu 32 fp32 both eager: " in shown
    assert "median of 4: " in shown
    assert "not measured: modulate: triton: " in shown
    assert "TRITON_INTERPRET" in shown


def test_bytes_are_those_of_the_record_forward_and_gradients_in_and_out_backward() -> None:
    found = measure(dataclasses.replace(TINY, passes=("forward", "backward", "both")))
    numbers, vectors = 4 * 8 * 768, 8 * 768
    forward = 4 * (3 * numbers + vectors)
    backward = 4 * (2 * numbers + vectors)  # the gradient of x is the output's own: counted once
    expected = [forward, backward, forward + backward]
    assert [round(r.gb_per_s * r.median_ms * 1e6) for r in found.rows] == pytest.approx(expected)


def test_a_provider_that_fails_is_left_out_with_its_reason_and_the_others_are_measured() -> None:
    providers = ("liger", "eager", "triton", "flash")
    found = measure(dataclasses.replace(TINY, ops=("modulate",), providers=providers, passes=PASSES))
    assert [(r.pass_name, r.provider) for r in found.rows] == [(name, "eager") for name in PASSES]
    assert [gap.what for gap in found.skipped] == ["modulate: liger", "modulate: triton"]  # once each
    assert "liger_kernel" in found.skipped[0].why


def test_the_share_of_the_ceiling_is_of_the_copy_measured_in_the_same_run() -> None:
    found = measure(TINY)
    share = 100 * found.rows[0].gb_per_s / found.copy_gb_per_s
    assert found.rows[0].percent_of_ceiling == pytest.approx(share)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": ("modulat",)}, "operator 'modulat' is none of .*modulate"),
        ({"dtypes": ("fp8",)}, "dtype 'fp8' is none of fp32, bf16, fp16"),
        ({"providers": ("cuda",)}, "provider 'cuda' is none of " + ", ".join(PROVIDERS)),
        ({"passes": ("update",)}, "pass 'update' is none of forward, backward, both"),
        ({"repeats": 0}, "0 repeats: at least 1"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU. Use --device cpu"):
        dataclasses.replace(TINY, device="cuda")


def test_comparing_says_how_much_faster_each_measurement_and_the_middle_became() -> None:
    old = result(row(), row(op="gated_residual", median_ms=9.0))
    new = result(row(median_ms=0.5), row(op="gated_residual", median_ms=3.0))
    assert bench_report.compare(old, new) == [
        "modulate cpu 32 fp32 both eager: 2.000 -> 0.500 ms, 4.00x",
        "gated_residual cpu 32 fp32 both eager: 9.000 -> 3.000 ms, 3.00x",
        "median of 2: 3.50x as fast as before",
    ]


def test_comparing_with_another_machine_says_so_and_with_nothing_in_common_is_refused() -> None:
    lines = bench_report.compare(result(row(), device="NVIDIA H800"), result(row()))
    assert "of another machine or thread count: NVIDIA H800, 1 threads" in lines[1]
    with pytest.raises(ValueError, match="holds none of these measurements"):
        bench_report.compare(result(row(op="flow_noise")), result(row()))


def test_a_result_reads_back_as_it_was_written_and_another_file_is_refused(tmp_path: Path) -> None:
    made = result(row(), row(tflop_per_s=0.25, provider="csrc"))
    json_path, *_ = bench_report.write(made, tmp_path)
    assert bench_report.read(json_path) == made
    (tmp_path / "other.json").write_text('{"rows": [], "skipped": []}')
    with pytest.raises(ValueError, match="other.json is no result of this benchmark.*Give a bench.json"):
        bench_report.read(tmp_path / "other.json")


def test_a_mistyped_operator_ends_the_command_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench_cli.main(["--ops", "modulat", "--device", "cpu"])
    assert end.value.code == 2
    assert "operator 'modulat' is none of" in capsys.readouterr().err
