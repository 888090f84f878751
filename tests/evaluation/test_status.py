"""iomm status: what a run's folder tells, as it grows."""

import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from iomm.cli import main
from iomm.evaluation import status as module
from iomm.evaluation.peaks import PEAK_BF16_FLOPS, mfu
from iomm.evaluation.report import build_report
from iomm.evaluation.status import Follower, Status, duration, render, rows

RUN = {
    "name": "b_stage1",
    "config": {"train": {"steps": 1000, "precision": "bf16"}},
    "device": "NVIDIA H800",
    "world_size": 8,
}


def train(step: int, loss: float | None = 0.5) -> dict[str, Any]:
    speed = {"images_per_s": 800.0, "step_ms": 640.0, "tflops": {"generator": 3000.0, "mllm": 956.0}}
    return {"kind": "train", "step": step, "loss": loss, **speed}


def event(step: int, name: str, detail: Any = None) -> dict[str, Any]:
    return {"kind": "event", "step": step, "event": name, "detail": detail}


def append(folder: Path, *records: dict[str, Any], file: str = "metrics.jsonl") -> None:
    with (folder / file).open("a") as opened:
        opened.writelines(json.dumps(record) + "\n" for record in records)


def state(folder: Path, age_s: float = 4.0, **changes: Any) -> None:
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
    whole = {"state": "running", "step": 200, "reason": None, "restarts": 2, "host": "node1", "pid": 7}
    whole |= {"job": "123", "updated": moment.isoformat(timespec="seconds"), "last_checkpoint": None}
    (folder / "run_state.json").write_text(json.dumps(whole | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    append(tmp_path, *(train(step, 1.0 - step / 1000) for step in range(10, 201, 10)))
    append(tmp_path, {"kind": "eval", "step": 100, "velocity_loss": {"image": 0.4, "null": 0.6}})
    state(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_00000200").mkdir()  # without checkpoint.json: not complete
    return tmp_path


def test_a_running_run_shows_everything_that_it_logged(folder: Path) -> None:
    text = render(Follower(folder).read())
    for part in (
        r"b_stage1",
        "running, ",
        "on node1, job 123",
        "200 of 1,000 (20.0%)",
        "0.8000, mean of the last 20 logged 0.8950",
        "image 0.4000, null 0.6000",
        "800.0 images/s, 640 ms a step, 3.96e+03 TFLOP/s",
        "50.0% of the bf16 peak",
        "step_00000100",
        "0 steps, 0 samples",
        "8 min 32 s of training at this speed",
    ):
        assert part in text, f"{part!r} is not in\n{text}"


def test_only_what_is_new_is_read_and_a_line_that_is_not_whole_waits(folder: Path) -> None:
    follower = Follower(folder)
    assert follower.read().step == 200
    whole = json.dumps(train(210)) + "\n"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(whole[:20])
        file.flush()
        assert follower.read().step == 200
        file.write(whole[20:] + "torn by a kill\n")
    assert follower.read().step == 210
    (folder / "metrics.jsonl").write_bytes(b"x" * (folder / "metrics.jsonl").stat().st_size)
    assert follower.read().step == 210  # what was read is not read again


def test_skipped_steps_and_bad_samples_are_counted_once_though_a_resumed_run_meets_them_again(
    folder: Path,
) -> None:
    append(folder, event(150, "nan_skip"), event(151, "nan_skip"), event(100, "resume"))
    append(folder, event(150, "nan_skip"), train(110))
    bad = {"shard": "a.tar", "key": "x", "reason": "truncated"}
    append(folder, bad, bad, {**bad, "key": "y"}, file="quarantine.jsonl")
    found = Follower(folder).read()
    assert (found.skipped_steps, found.bad_samples, found.restarts) == (2, 2, 2)
    assert found.step == 110  # it went back and stands there now


def test_a_heldout_loss_behind_the_checkpoint_that_a_run_went_back_to_is_forgotten(folder: Path) -> None:
    before = Follower(folder).read().heldout
    append(folder, {"kind": "eval", "step": 250, "velocity_loss": {"null": 9.0}}, event(200, "resume"))
    assert Follower(folder).read().heldout == {"null": 9.0}
    append(folder, train(210))
    assert Follower(folder).read().heldout == before != {"null": 9.0}


def test_without_a_state_the_resumes_are_the_restarts_and_the_state_is_not_known(folder: Path) -> None:
    (folder / "run_state.json").unlink()
    append(folder, event(100, "resume"))
    found = Follower(folder).read()
    assert found.restarts == 1 and found.to_go_s is None
    assert "not known: the folder has no run_state.json" in render(found)


def test_a_run_that_says_it_runs_and_writes_nothing_is_called_silent(folder: Path) -> None:
    state(folder, age_s=3600)
    found = Follower(folder).read()
    assert found.silent_at(time.time()) and "running, but silent since 1 h ago" in render(found)
    state(folder, age_s=3600, state="done")
    assert not Follower(folder).read().silent_at(time.time())


def test_the_last_thing_that_went_wrong_is_shown_in_one_line(folder: Path) -> None:
    assert Follower(folder).read().notice is None
    append(folder, event(120, "save_failed", "the disk is full " * 20), event(130, "save", "step_00000130"))
    shown = dict(rows(Follower(folder).read()))["last notice"]
    assert shown.startswith("step 120, save_failed: the disk is full") and len(shown) < 200


@pytest.mark.parametrize(("ended", "reason"), [("failed", "OSError: disk"), ("preempted", "SIGUSR1")])
def test_a_run_that_ended_says_why_and_has_no_time_to_go(folder: Path, ended: str, reason: str) -> None:
    state(folder, state=ended, reason=reason)
    found = Follower(folder).read()
    assert f"{ended}: {reason}" in dict(rows(found))["state"] and "time to go" not in dict(rows(found))


def test_a_run_that_has_just_begun_shows_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    shown = dict(rows(Follower(tmp_path).read()))
    assert shown["last checkpoint"] == "none yet" and "loss" not in shown and "MFU" not in shown


def test_a_skipped_step_has_no_loss_and_does_not_spoil_the_mean(folder: Path) -> None:
    append(folder, train(210, None))
    found = Follower(folder).read()
    assert found.loss is None and found.mean_loss is not None and found.step == 210


@pytest.mark.parametrize(
    ("device", "precision", "share"),
    [("NVIDIA H800", "bf16", 0.5), ("NVIDIA H800", "fp32", None), ("CPU, 1 threads a rank", "bf16", None)],
)
def test_mfu_is_given_where_the_peak_is_known_and_nowhere_else(
    device: str, precision: str, share: float | None
) -> None:
    assert mfu(989.0 * 4, device, 8, precision) == share
    assert all(100e12 < peak < 1e15 for peak in PEAK_BF16_FLOPS.values())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_are_in_the_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_report_shows_the_same_block(folder: Path) -> None:
    page = build_report(folder).read_text()
    assert "When this page was written" in page and "200 of 1,000 (20.0%)" in page
    updated = json.loads((folder / "run_state.json").read_text())["updated"]
    assert f"running, {updated[:10]} {updated[11:19]} UTC on node1" in page  # no "ago": a page stays true


def test_the_command_prints_once_and_watches_until_the_run_ends(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out.count("b_stage1") == 1

    def sleep(seconds: float) -> None:
        assert seconds == 2.5
        state(folder, state="done")

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert main(["status", str(folder), "--watch", "2.5"]) == 0
    assert capsys.readouterr().out.count("b_stage1") == 2


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert "is no run" in capsys.readouterr().err


def test_looking_at_a_run_needs_none_of_the_heavy_imports(folder: Path) -> None:
    code = f"import sys; from iomm.cli import main; main(['status', {str(folder)!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "matplotlib", "megatron", "transformers"}
    assert isinstance(Follower(folder).read(), Status)
