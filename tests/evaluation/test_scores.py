"""Scores that a run's folder keeps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from iomm.evaluation.bootstrap import Interval
from iomm.evaluation.scores import BenchScore, leave_score, read_scores

HALF = Interval(mean=0.5, low=0.4, high=0.6)


def score(**changes: Any) -> BenchScore:
    base = BenchScore(
        bench="GenEval",
        step=100,
        prompts=553,
        images_per_prompt=4,
        judge="Mask2Former",
        best=1.0,
        settings={"guidance": 3.0, "prompts": "original"},
        overall=HALF,
        parts={"single object": Interval(mean=0.9, low=0.85, high=0.95), "counting": HALF},
    )
    return dataclasses.replace(base, **changes)


def test_a_score_comes_back_as_it_was_left_with_its_parts_in_order(tmp_path: Path) -> None:
    path = leave_score(tmp_path, score())
    assert path.parent == tmp_path / "scores" and path.name.startswith("geneval-00000100-")
    notes: list[str] = []
    [found] = read_scores(tmp_path, notes)["GenEval"]
    assert found == score(written=found.written) and found.written.endswith("+00:00")
    assert list(found.parts) == ["single object", "counting"] and notes == []


def test_the_same_settings_replace_a_score_and_other_ones_stand_beside_it(tmp_path: Path) -> None:
    first = leave_score(tmp_path, score())
    assert leave_score(tmp_path, score(overall=Interval(mean=0.7, low=0.6, high=0.8))) == first
    others = [score(settings={"guidance": 1.0}), score(judge="people"), score(step=200), score(bench="DPG")]
    others += [score(prompts=10), score(images_per_prompt=1)]
    assert len({first, *(leave_score(tmp_path, other) for other in others)}) == 7
    found = read_scores(tmp_path, [])
    assert list(found) == ["DPG", "GenEval"]
    assert [one.step for one in found["GenEval"]] == [200, 100, 100, 100, 100, 100]
    assert 0.7 in [one.overall.mean for one in found["GenEval"]]


def test_a_file_that_is_no_score_is_named_and_left_out(tmp_path: Path) -> None:
    whole = json.loads(leave_score(tmp_path, score()).read_text())
    (tmp_path / "scores" / "torn.json").write_text(json.dumps(whole)[:99])
    (tmp_path / "scores" / "other.json").write_text(json.dumps({"bench": "x"}))
    (tmp_path / "scores" / "list.json").write_text("[]")
    (tmp_path / "scores" / "words.json").write_text(json.dumps({**whole, "overall": "high"}))
    notes: list[str] = []
    assert list(read_scores(tmp_path, notes)) == ["GenEval"]
    assert sorted(note.split()[0] for note in notes) == [
        f"scores/{name}.json" for name in ("list", "other", "torn", "words")
    ]


def test_a_run_without_scores_has_none(tmp_path: Path) -> None:
    assert read_scores(tmp_path, []) == {}
