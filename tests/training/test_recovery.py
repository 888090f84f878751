"""Going on from the newest checkpoint that can be read."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iomm.checkpoint import sharded
from iomm.checkpoint.folder import INFO_FILE, CheckpointError, CheckpointInfo, DamagedCheckpoint
from iomm.checkpoint.saver import save
from iomm.parallel.mesh import Mesh
from iomm.training.phases import Phases
from iomm.training.recovery import RankLost, naming_lost_ranks, resume
from iomm.training.train import train
from tests.checkpoint.small_engine import config, everything, make
from tests.checkpoint.small_engine import train as take_steps
from tests.small_run import events, losses, small_config


def shard_of(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def zero(path: Path) -> None:
    """As a disk leaves a file whose contents it lost in a crash: of its length, without its bytes."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a shard is shorter": lambda path: os.truncate(shard_of(path), 100),
    "a shard is gone": lambda path: shard_of(path).unlink(),
    "a shard is zeros": lambda path: zero(shard_of(path)),
    "the table of contents is zeros": lambda path: zero(path / ".metadata"),
    "the plain data is zeros": lambda path: zero(path / INFO_FILE),
    "the plain data is another JSON": lambda path: (path / INFO_FILE).write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_taken(
    mesh: Mesh, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    engine = make(config(), mesh)
    take_steps(engine, 0, 1)
    good = save(tmp_path, 1, engine, config(), {}, keep_last=2, mesh=mesh)
    as_saved = everything(engine)
    take_steps(engine, 1, 1)
    damage(save(tmp_path, 2, engine, config(), {}, keep_last=2, mesh=mesh))
    other = make(config(), mesh, seed=1)
    resumed = resume(tmp_path, other, config(), mesh)
    assert (resumed.path, resumed.step) == (good, 1)
    aside = tmp_path / "damaged_step_00000002"
    assert sorted(tmp_path.iterdir()) == [aside, good]
    (said,) = resumed.damaged
    assert "step_00000002" in said and said.endswith(f"It is now {aside}.")
    loaded = everything(other)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in as_saved.items())


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(mesh: Mesh, tmp_path: Path) -> None:
    engine = make(config(), mesh)
    for step in (1, 2):
        zero(shard_of(save(tmp_path, step, engine, config(), {}, keep_last=2, mesh=mesh)))
    with pytest.raises(
        DamagedCheckpoint, match=r"none of the checkpoints in .*00000002.*00000001.* restored"
    ):
        resume(tmp_path, engine, config(), mesh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged_step_00000001", "damaged_step_00000002"]
    with pytest.raises(
        DamagedCheckpoint, match="damaged_step_00000001, damaged_step_00000002 were set aside"
    ):
        resume(tmp_path, engine, config(), mesh)  # as torchrun does at once


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "cannot be read now.*Try again once the disk answers"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_a_checkpoint_keeps_its_name_where_the_machine_is_at_fault(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, said: str
) -> None:
    engine = make(config(), mesh)
    for step in (1, 2):
        save(tmp_path, step, engine, config(), {}, keep_last=2, mesh=mesh)

    def load(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(sharded.dist_checkpointing, "load", load)
    with pytest.raises((CheckpointError, RuntimeError), match=said) as caught:
        resume(tmp_path, engine, config(), mesh)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_checkpoint_that_a_dying_launch_prunes_under_the_reader_is_no_damage(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = make(config(), mesh), sharded.load
    for step in (1, 2):
        save(tmp_path, step, engine, config(), {}, keep_last=2, mesh=mesh)

    def load(path: Path, *rest: Any) -> CheckpointInfo:
        if path.name == "step_00000002":
            shutil.rmtree(path)
        return real(path, *rest)

    monkeypatch.setattr(sharded, "load", load)
    resumed = resume(tmp_path, engine, config(), mesh)
    assert (resumed.step, resumed.damaged) == (1, ())
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_checkpoint_of_another_run_is_refused_and_keeps_its_name(mesh: Mesh, tmp_path: Path) -> None:
    engine = make(config(), mesh)
    path = save(tmp_path, 1, engine, config(), {}, keep_last=2, mesh=mesh)
    info = json.loads((path / INFO_FILE).read_text())
    info["config"]["generator"]["condition_width"] = 16
    (path / INFO_FILE).write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=r"generator\.condition_width = 16, this run 8"):
        resume(tmp_path, engine, config(), mesh)
    assert path.is_dir()


def test_a_run_that_has_not_saved_starts_at_its_beginning(mesh: Mesh, tmp_path: Path) -> None:
    resumed = resume(tmp_path / "none", make(config(), mesh), config(), mesh)
    assert (resumed.path, resumed.step, resumed.damaged) == (None, 0, ())


def test_a_run_goes_on_before_its_damaged_checkpoint_says_so_and_has_the_same_curve(
    world, tmp_path, capsys
) -> None:
    settings = small_config(world, tmp_path, train__steps=8, train__eval_every_steps=100)
    train(settings)
    curve = losses(settings.run_dir)
    zero(shard_of(settings.run_dir / "checkpoints" / "step_00000008"))
    capsys.readouterr()
    train(settings)
    assert losses(settings.run_dir) == curve
    (event,) = events(settings.run_dir, "checkpoint_damaged")
    assert event["step"] == 4 and "step_00000008" in event["detail"]
    assert [e["step"] for e in events(settings.run_dir, "resume")] == [4]
    assert "It is now" in capsys.readouterr().err
    log = (settings.run_dir / "logs" / "rank_00000.log").read_text()
    assert "checkpoint_damaged" in log and log.count(" starts: process ") == 2


def test_an_error_of_the_network_says_that_another_rank_is_gone_and_others_stay(mesh: Mesh) -> None:
    phases = Phases(mesh.device)
    phases.step = 7
    message = "[../gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:1. This is typical"
    lost = pytest.raises(RankLost, match=r"rank 0 lost another rank in step 7: .* closed by peer")
    with lost, naming_lost_ranks(mesh, phases):
        raise RuntimeError(message)
    with pytest.raises(RankLost), naming_lost_ranks(mesh, phases):
        raise torch.distributed.DistBackendError("NCCL error: remote process exited")
    with pytest.raises(RuntimeError, match="^shapes do not match$"), naming_lost_ranks(mesh, phases):
        raise RuntimeError("shapes do not match")
