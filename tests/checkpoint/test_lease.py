"""The newest launch writes; a ghost of an earlier one does not."""

import json
from pathlib import Path

import pytest

from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.lease import LEASE_FILE, Lease, Superseded
from iomm.checkpoint.saver import Saver
from iomm.parallel.mesh import Mesh
from tests.checkpoint.small_engine import config, make, train


def test_the_newest_launch_holds_the_lease_and_the_older_one_learns_who_does(tmp_path):
    first = Lease(tmp_path, writes=True)
    first.check()
    second = Lease(tmp_path, writes=True)
    second.check()
    with pytest.raises(Superseded, match=r"process \d+ on \S+ has taken over .* writes nothing more"):
        first.check()
    assert [p.name for p in tmp_path.iterdir()] == [LEASE_FILE]


def test_a_superseded_launch_that_torchrun_restarts_does_not_take_the_lease_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    Lease(tmp_path, writes=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    mine = Lease(tmp_path, writes=True)  # its own restart
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    heir = Lease(tmp_path, writes=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with pytest.raises(Superseded, match="has taken over"):
        Lease(tmp_path, writes=True)
    heir.check()
    with pytest.raises(Superseded):
        mine.check()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 3")  # its first try failed before it took the lease
    Lease(tmp_path, writes=True).check()


def test_ranks_that_write_nothing_hold_no_lease_and_never_lose_it(tmp_path):
    Lease(tmp_path, writes=False).check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "", "[]", '{"pid": 1}'])
def test_a_lease_that_is_gone_or_torn_is_nobodys(tmp_path, content):
    lease = Lease(tmp_path, writes=True)
    (tmp_path / LEASE_FILE).unlink()
    if content is not None:
        (tmp_path / LEASE_FILE).write_text(content)
    with pytest.raises(Superseded, match="is gone or no lease any more"):
        lease.check()


def saver(folder: Path, mesh: Mesh, *, background: bool) -> Saver:
    lease = Lease(folder, writes=True)
    return Saver(folder / "checkpoints", 1, mesh, background=background, lease=lease)


@pytest.mark.parametrize("background", [False, True])
def test_a_ghost_can_neither_begin_nor_finish_a_checkpoint_nor_remove_anothers(
    mesh: Mesh, tmp_path, background
):
    engine = make(config(), mesh)
    train(engine, 0, 1)
    ghost = saver(tmp_path, mesh, background=True)
    ghost.save(5, engine, config(), {})  # it is being written when the new launch begins
    heir = saver(tmp_path, mesh, background=background)
    heir.save(1, engine, config(), {})
    with pytest.raises(
        (Superseded, CheckpointError)
    ):  # its folder was removed under its hands, or it looks first
        ghost.finish()
    with pytest.raises(Superseded):
        ghost.save(6, engine, config(), {})
    heir.finish()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_ghost_that_has_written_everything_does_not_publish(mesh: Mesh, tmp_path):
    engine = make(config(), mesh)
    train(engine, 0, 1)
    ghost = saver(tmp_path, mesh, background=True)
    ghost.save(5, engine, config(), {})
    (tmp_path / LEASE_FILE).write_text(json.dumps({"id": "another", "pid": 1, "host": "n2", "taken": "now"}))
    with pytest.raises(Superseded, match="process 1 on n2"):
        ghost.finish()
    assert not list((tmp_path / "checkpoints").iterdir())
