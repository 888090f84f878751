"""Stop signals: what is remembered, what stays pending, and the exit status that follows."""

import os
import signal
import threading

import pytest

from iomm.training.stop import StopSignal, exit_status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_its_handler_is_gone_afterwards(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.number == number
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_blocked_sigusr1_counts_also_if_it_came_before_anyone_listened():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        # To this thread: a job's processes block it from birth, but threads of earlier tests here do not.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with StopSignal() as stop:
            assert stop.number == signal.SIGUSR1
    finally:
        assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def test_the_exit_status_asks_to_be_launched_again_only_after_sigusr1(monkeypatch):
    monkeypatch.delenv("IOMM_REQUEUE_FILE", raising=False)
    assert exit_status(signal.SIGUSR1) == 85
    assert exit_status(signal.SIGTERM) == 143
    assert exit_status(signal.SIGINT) == 130


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_under_torchrun_a_preempted_rank_exits_0_and_rank_0_tells_the_launcher(
    tmp_path, monkeypatch, rank, told
):
    file = tmp_path / "requeue"
    monkeypatch.setenv("IOMM_REQUEUE_FILE", str(file))
    monkeypatch.setenv("RANK", rank)
    assert exit_status(signal.SIGUSR1) == 0
    assert file.exists() == told
    assert exit_status(signal.SIGTERM) == 143
    if told:
        assert file.read_text() == "SIGTERM\n"
