"""Without progress a rank says where it stands and ends; a wait for samples is said."""

import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from iomm.data.loader import Reading
from iomm.data.shards import SampleRef, ShardSet
from iomm.training.phases import Phases
from iomm.training.train import train
from iomm.training.watchdog import HUNG_EXIT, Watchdog, collective
from tests.small_run import events, losses, small_config

WAIT_S = 20  # for a thread that is due in milliseconds
LONG_AGO = 1000.0


class Ending:
    """Takes the place of the process's end."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.reached = threading.Event()

    def __call__(self, status: int) -> None:
        self.status = status
        self.reached.set()


def stand_still(phases: Phases, name: str, step: int) -> None:
    phases.current, phases.step, phases.since = name, step, time.monotonic() - LONG_AGO


def watchdog(phases: Phases, log: Path, **settings: Any) -> Watchdog:
    common: dict[str, Any] = dict(timeout_s=0.0, stall_s=0.0, reading=list, on_stall=print, on_hang=print)
    return Watchdog(phases, log, 3, **(common | settings))


@pytest.fixture
def phases() -> Phases:
    return Phases(torch.device("cpu"))


def test_a_rank_without_progress_writes_the_stacks_of_all_threads_says_why_and_ends(phases, tmp_path, capsys):
    end, told, release = Ending(), [], threading.Event()
    log = tmp_path / "rank.log"

    def reader_that_waits() -> None:
        release.wait(WAIT_S)

    thread = threading.Thread(target=reader_that_waits, name="the-reader")
    thread.start()
    with watchdog(phases, log, timeout_s=0.08, on_hang=told.append, end=end):
        stand_still(phases, "step", 7)
        assert end.reached.wait(WAIT_S)
    release.set()
    thread.join()
    assert end.status == HUNG_EXIT == 86
    (reason,) = told
    assert reason.startswith("rank 3 on ") and "in step 7, phase step" in reason and str(log) in reason
    written = log.read_text()
    assert reason in written
    assert "-- thread MainThread" in written and "stand_still" not in written
    assert "-- thread the-reader" in written and "reader_that_waits" in written
    assert reason in capsys.readouterr().err


def test_a_rank_that_cannot_say_why_it_hangs_ends_all_the_same(phases, tmp_path, capsys):
    end = Ending()

    def on_hang(reason: str) -> None:
        raise OSError("No space left on device")

    with watchdog(phases, tmp_path / "rank.log", timeout_s=0.08, on_hang=on_hang, end=end):
        stand_still(phases, "save", 1)
        assert end.reached.wait(WAIT_S)
    assert "OSError: No space left" in capsys.readouterr().err


def test_a_wait_for_samples_is_said_once_a_step_with_the_shard_that_is_read(phases, tmp_path):
    said: list[str] = []
    came = threading.Semaphore(0)

    def on_stall(message: str) -> None:
        said.append(message)
        came.release()

    reading = [
        Reading("fast.tar", "b", time.monotonic()),
        Reading("s3://slow.tar", "a", time.monotonic() - 60),
    ]
    with watchdog(phases, tmp_path / "log", stall_s=0.08, reading=lambda: reading, on_stall=on_stall):
        stand_still(phases, "batch", 4)
        assert came.acquire(timeout=WAIT_S)
        stand_still(phases, "batch", 5)
        assert came.acquire(timeout=WAIT_S)
    assert [message.split(";")[0][:40] for message in said] == [
        "step 4 has been waiting for samples for ",
        "step 5 has been waiting for samples for ",
    ]
    assert "the loader is reading sample a of s3://slow.tar for 60 s, b of fast.tar for 0 s" in said[0]


def test_progress_keeps_the_watchdog_quiet_and_zero_turns_it_off(phases, tmp_path):
    log, end = tmp_path / "log", Ending()
    with watchdog(phases, log, timeout_s=1.0, stall_s=60.0, end=end), phases("step"):
        for _ in range(40):  # for twice the limit
            time.sleep(0.05)
            phases.alive()
    assert log.read_text() == "" and not end.reached.is_set()
    stand_still(phases, "step", 1)
    with watchdog(phases, tmp_path / "none", end=lambda _: pytest.fail("it ended")):
        pass
    assert not (tmp_path / "none").exists()


def test_every_forward_pass_of_an_evaluation_is_progress(world, tmp_path, monkeypatch):
    alive: list[str] = []
    monkeypatch.setattr(Phases, "alive", lambda phases: alive.append(phases.current))
    config = small_config(world, tmp_path, train__steps=1)
    train(config)
    passes = 3 * 8  # of the held-out loss alone: conditions x timesteps
    assert alive.count("evaluate") > passes and alive.count("step") == 1


def test_the_innermost_collective_of_a_stack_is_named_without_its_wrappers():
    c10d = "/x/torch/distributed/distributed_c10d.py"
    frames = [
        ("/x/iomm/parallel/mesh.py", "gather_objects"),
        ("/x/torch/distributed/c10d_logger.py", "wrapper"),
        (c10d, "all_gather_object"),
        (c10d, "all_gather"),
        (c10d, "_wait"),
    ]
    stack = traceback.StackSummary.from_list([(file, 1, name, "") for file, name in frames])
    assert collective(stack) == "all_gather called by gather_objects"
    manager = traceback.StackSummary.from_list(
        [
            ("/x/buffer.py", 1, "start_grad_sync", ""),
            ("/x/contextlib.py", 1, "__exit__", ""),
            (c10d, 9, "_manager", ""),
        ]
    )
    assert collective(manager) == "manager called by start_grad_sync"
    assert collective(traceback.StackSummary.from_list([("/x/a.py", 1, "all_reduce", "")])) is None


def test_a_run_logs_which_shard_it_waited_for_and_goes_on(world, tmp_path, monkeypatch):
    said, real_read, real_say = threading.Event(), ShardSet.read_image, Watchdog._say_stall

    def read_image(shards: ShardSet, ref: SampleRef) -> bytes:
        if threading.current_thread().name.startswith("iomm-decode"):
            assert said.wait(WAIT_S)  # a store that answers once somebody has complained
        return real_read(shards, ref)

    def say_stall(watchdog: Watchdog, idle_s: float) -> None:
        real_say(watchdog, idle_s)
        said.set()

    monkeypatch.setattr(ShardSet, "read_image", read_image)
    monkeypatch.setattr(Watchdog, "_say_stall", say_stall)
    config = small_config(world, tmp_path, train__steps=2, train__stall_notice_s=0.2, data__heldout=[])
    train(config)
    (event,) = events(config.run_dir, "loader_stall")
    assert "step 1 has been waiting for samples for" in event["detail"]
    assert f" of {world}/train.tar for " in event["detail"]
    assert sorted(losses(config.run_dir)) == [1, 2]


# A C call that keeps the interpreter's lock, as a broken extension or a driver does.
HOLDS_THE_LOCK = """
import ctypes, sys, torch
from pathlib import Path
from iomm.training.phases import Phases
from iomm.training.watchdog import Watchdog
said = lambda text: sys.exit("unreachable")
with Watchdog(Phases(torch.device("cpu")), Path(sys.argv[1]), 0, timeout_s=0.5, stall_s=0.0,
              reading=list, on_stall=said, on_hang=said):
    ctypes.PyDLL(None).sleep(60)
"""


def test_a_rank_whose_c_code_holds_the_interpreter_ends_too(tmp_path):
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(log)], timeout=60, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert "Timeout (0:00:00" in log.read_text() and "most recent call first" in log.read_text()
