"""`run_state.json`: what it says while a run lasts, when it ends, and when it is launched again."""

import json
import os
from pathlib import Path

import pytest

from iomm.training.state import STATE_FILE, StateFile, read_state, slurm_job


def start(folder: Path, step: int = 0, checkpoint: Path | None = None) -> StateFile:
    return StateFile(folder, step, checkpoint, writes=True)


def test_a_running_run_says_its_step_checkpoint_and_process(tmp_path):
    with start(tmp_path, 3, tmp_path / "step_3") as state:
        state.update(7)
        state.saved(tmp_path / "step_7")
        now = read_state(tmp_path)
        assert now is not None
        assert (now.state, now.step, now.reason, now.restarts) == ("running", 7, None, 0)
        assert now.pid == os.getpid() and now.last_checkpoint == str(tmp_path / "step_7")
        state.end("done", 8)
    assert read_state(tmp_path).state == "done"
    assert list(tmp_path.iterdir()) == [tmp_path / STATE_FILE]


def test_every_launch_in_a_folder_but_the_first_is_a_restart(tmp_path):
    for launches in range(3):
        with start(tmp_path) as state:
            state.end("preempted", 5, "SIGUSR1")
        now = read_state(tmp_path)
        assert (now.restarts, now.state, now.reason) == (launches, "preempted", "SIGUSR1")


def test_an_error_makes_the_run_failed_with_its_message(tmp_path):
    with pytest.raises(OSError, match="disk"), start(tmp_path) as state:
        state.update(4)
        raise OSError("the disk is gone")
    now = read_state(tmp_path)
    assert (now.state, now.step, now.reason) == ("failed", 4, "OSError: the disk is gone")


def test_an_error_after_the_end_does_not_hide_the_end(tmp_path):
    with pytest.raises(KeyboardInterrupt), start(tmp_path) as state:
        state.end("stopped", 4, "SIGINT")
        raise KeyboardInterrupt
    assert read_state(tmp_path).state == "stopped"


def test_a_rank_that_does_not_write_leaves_the_folder_alone(tmp_path):
    with StateFile(tmp_path, 0, None, writes=False) as state:
        state.update(1)
        state.end("done", 2)
    assert read_state(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_newer_version_s_fields_are_passed_over_and_garbage_is_named(tmp_path):
    with start(tmp_path):
        pass
    path = tmp_path / STATE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    assert read_state(tmp_path) is not None
    for garbage in ("{", "[]", "{}"):
        path.write_text(garbage)
        with pytest.raises(ValueError, match="is not the state of a run"):
            read_state(tmp_path)
        StateFile(tmp_path, 0, None, writes=True)  # as a crash leaves it: the next launch writes over it
        assert read_state(tmp_path).restarts == 0


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
    ],
)
def test_a_slurm_job_has_the_name_that_squeue_gives_it(environment, job):
    assert slurm_job(environment) == job
