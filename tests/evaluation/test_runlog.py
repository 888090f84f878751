"""Reading a run's folder after kills and resumes."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from iomm.evaluation.runlog import read_jsonl, read_run


def write(path: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [r["step"] for r in records]


def test_a_torn_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": 1.0}], '{"kind": "train", "st')
    log = read_run(tmp_path)
    assert steps(log.train) == [1]
    assert any("torn line" in note for note in log.notes)


def test_a_torn_line_in_the_middle_is_named_by_its_number(tmp_path: Path) -> None:
    lines = ['{"kind": "train", "step": 1}', '{"kind": "tra', '{"kind": "train", "step": 2}', ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    log = read_run(tmp_path)
    assert steps(log.train) == [1, 2]
    assert any("metrics.jsonl, line 2, is torn" in note for note in log.notes)


def test_steps_repeated_after_a_resume_keep_their_last_value(tmp_path: Path) -> None:
    first = [{"kind": "train", "step": s, "loss": 1.0} for s in (1, 2, 3, 4)]
    again = [{"kind": "event", "step": 2, "event": "resume"}, {"kind": "train", "step": 3, "loss": 0.5}]
    write(tmp_path / "metrics.jsonl", first + again)
    log = read_run(tmp_path)
    assert [(r["step"], r["loss"]) for r in log.train] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert any("2 records were superseded" in note for note in log.notes)


def test_an_evaluation_beyond_the_resumed_step_is_superseded_too(tmp_path: Path) -> None:
    records = [
        {"kind": "eval", "step": 2},
        {"kind": "train", "step": 4},
        {"kind": "eval", "step": 4},
        {"kind": "event", "step": 2, "event": "resume"},
    ]
    log = read_run(write(tmp_path / "metrics.jsonl", records).parent)
    assert steps(log.evals) == [2]
    assert log.train == []
    assert len(log.events) == 1


def test_grids_are_found_by_step_and_kind(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [])
    (tmp_path / "samples").mkdir()
    for name in ("step_000500_text", "step_000500_reconstruction", "step_001000_text", "other"):
        (tmp_path / "samples" / f"{name}.png").touch()
    log = read_run(tmp_path)
    kinds = {step: sorted(by_kind) for step, by_kind in log.grids.items()}
    assert kinds == {500: ["reconstruction", "text"], 1000: ["text"]}


def test_a_broken_run_json_is_named_and_the_metrics_still_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": ')
    write(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 7}])
    log = read_run(tmp_path)
    assert log.run == {}
    assert steps(log.train) == [7]
    assert any("run.json is not readable" in note for note in log.notes)


@given(count=st.integers(1, 6), cut=st.integers(0, 400))
def test_a_log_cut_anywhere_loses_only_its_last_line(tmp_path_factory: Any, count: int, cut: int) -> None:
    text = "".join(json.dumps({"kind": "train", "step": n, "detail": "é\u2028"}) + "\n" for n in range(count))
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    whole = text.encode()[:cut]
    path.write_bytes(whole)
    assert len(list(read_jsonl(path, []))) in (whole.count(b"\n"), whole.count(b"\n") + 1)
