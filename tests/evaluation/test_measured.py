"""Benchmark tables and reconstruction on the report's page."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from iomm.evaluation.bootstrap import Interval
from iomm.evaluation.measured import MAX_OLDER, bench_sections, reconstruction_section
from iomm.evaluation.report import fixed
from iomm.evaluation.scores import (
    BenchScore,
    Reconstruction,
    leave_score,
    read_reconstruction,
    read_scores,
    write_json,
)
from tests.evaluation.test_report import report_of, train, write_run
from tests.evaluation.test_scores import score

REBUILT = Reconstruction(
    step=100,
    images=12,
    sampler_steps=25,
    trained_mask_ratio=0.85,
    ratios=[0.0, 0.5, 1.0],
    psnr_db=[Interval(mean=mean, low=mean - 1, high=mean + 1) for mean in (14.0, 12.5, 9.25)],
)


def sections(*scores: BenchScore) -> Any:
    return bench_sections({"GenEval": sorted(scores, key=lambda one: one.step, reverse=True)})[0]


def test_scores_and_reconstruction_stand_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, [train(1)])
    leave_score(run, score(step=50))
    leave_score(run, score(step=100, overall=Interval(mean=0.7, low=0.6, high=0.8)))
    leave_score(run, score(step=100, bench="DPG", best=100.0, overall=Interval(mean=61.4, low=60, high=63)))
    write_json(run / "reconstruction" / "step_00000100.json", asdict(REBUILT))
    page = report_of(run)
    for phrase in (
        "GenEval, step 100 553 prompts, 4 images each; best score 1. Judge: Mask2Former. Settings: guidance",
        "overall 0.700 0.600 – 0.800 single object 0.900 0.850 – 0.950",
        "1 older or with other settings",
        "61.4 60.0 – 63.0",
        "they are 4.8 dB closer to their images",
        "0.5 12.50 11.50 – 13.50 +3.25",
    ):
        assert phrase in page.text
    assert page.text.index("DPG, step 100") < page.text.index("GenEval, step 100")
    assert sum(a.startswith("data:image/svg") for a in page.addresses) == 2 * 5  # of training 3


def test_only_scores_taken_alike_make_a_trend() -> None:
    newest = score(step=300)
    other = [
        score(step=200, settings={"guidance": 1.0}),
        score(step=100, judge="people"),
        score(step=90, prompts=5),
    ]
    assert sections(newest, *other).trend is None
    trend = sections(newest, *other, score(step=50)).trend
    assert trend.alt == "Overall score of GenEval over steps, from 0.5 to 0.5."


def test_many_older_scores_are_cut_and_counted() -> None:
    section = sections(*(score(step=step) for step in range(1, MAX_OLDER + 4)))
    assert (section.newest.step, section.older[0].step) == (MAX_OLDER + 3, MAX_OLDER + 2)
    assert (len(section.older), section.older_left_out) == (MAX_OLDER, 2)


def test_bars_lie_between_nothing_and_the_best_score() -> None:
    rows = sections(score(best=5.0, overall=Interval(mean=2, low=1, high=5.5))).rows
    assert (rows[0].low_percent, rows[0].high_percent) == (20, 100)


def test_reconstruction_without_a_fully_masked_picture_compares_with_nothing(tmp_path: Path) -> None:
    part = dataclasses.replace(REBUILT, ratios=[0.0, 0.5], psnr_db=REBUILT.psnr_db[:2])
    section = reconstruction_section(part)
    assert section.gain_db is None and [row[2] for row in section.rows] == [None, None]
    run = write_run(tmp_path, [train(1)])
    write_json(run / "reconstruction" / "step_00000100.json", asdict(part))
    assert "closer to" not in report_of(run).text


def test_the_newest_readable_reconstruction_counts(tmp_path: Path) -> None:
    for step in (90, 100):
        record = asdict(dataclasses.replace(REBUILT, step=step))
        write_json(tmp_path / "reconstruction" / f"step_{step:08d}.json", record)
    (tmp_path / "reconstruction" / "step_00000200.json").write_text(json.dumps(asdict(REBUILT))[:50])
    notes: list[str] = []
    assert read_reconstruction(tmp_path, notes) == REBUILT
    assert [note.split()[0] for note in notes] == ["reconstruction/step_00000200.json"]
    assert read_scores(tmp_path, notes) == {}


@pytest.mark.parametrize(
    ("value", "best", "text"), [(0.5234, 1, "0.523"), (3.21, 5, "3.21"), (61.44, 100, "61.4")]
)
def test_a_score_has_three_digits(value: float, best: float, text: str) -> None:
    assert fixed(value, best) == text
