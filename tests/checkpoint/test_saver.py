"""Writing checkpoints, at once and beside the training, in one process; several ranks are in
tests/layouts."""

import builtins
import errno
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iomm.checkpoint import saver
from iomm.checkpoint.folder import CheckpointError, latest, read_info
from iomm.checkpoint.saver import RankOutOfStep, Saver, _Save, save
from iomm.checkpoint.sharded import load
from iomm.parallel.mesh import Mesh
from tests.checkpoint.small_engine import config, everything, make, precise, train


def test_saving_does_not_change_what_is_saved(mesh: Mesh, tmp_path: Path) -> None:
    engine = make(config(), mesh)
    train(engine, 0, 1)
    before = everything(engine)
    save(tmp_path, 1, engine, config(), {}, keep_last=1, mesh=mesh)
    after = everything(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_last_checkpoints_are_kept_and_leftovers_of_dead_runs_go(mesh: Mesh, tmp_path: Path) -> None:
    engine = make(config(), mesh)
    (tmp_path / ".tmp_step_00000009").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step, engine, config(), {}, keep_last=2, mesh=mesh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert latest(tmp_path) == tmp_path / "step_00000003"


def test_saving_the_same_step_again_replaces_the_checkpoint(mesh: Mesh, tmp_path: Path) -> None:
    engine = make(config(), mesh)
    for run in ("first", "second"):
        path = save(tmp_path, 1, engine, config(), {"run": run}, keep_last=2, mesh=mesh)
    assert read_info(path).extra == {"run": "second"}
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_full_disk_is_noticed_before_anything_is_written(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(config(), mesh)
    save(tmp_path, 1, engine, config(), {}, keep_last=2, mesh=mesh)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(
        CheckpointError, match=r"is full: a checkpoint needs [\d,]+ bytes, 100 are free. Delete"
    ):
        save(tmp_path, 2, engine, config(), {}, keep_last=2, mesh=mesh)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_disk_that_fills_up_while_saving_leaves_the_last_checkpoint_valid_and_saving_possible(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(config(), mesh)
    good = save(tmp_path, 1, engine, config(), {}, keep_last=2, mesh=mesh)

    def on_full_disk(file: Any, mode: str = "r", *args: Any) -> Any:
        return builtins.open("/dev/full" if str(file).endswith(".distcp") else file, mode, *args)

    with monkeypatch.context() as broken:
        broken.setattr(saver.filesystem_async, "open", on_full_disk, raising=False)
        with pytest.raises(
            CheckpointError, match="is full: a checkpoint needs .* Older checkpoints are untouched"
        ):
            save(tmp_path, 2, engine, config(), {}, keep_last=2, mesh=mesh)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    load(good, make(config(), mesh), config(), mesh)
    assert save(tmp_path, 2, engine, config(), {}, keep_last=2, mesh=mesh) == latest(tmp_path)


def test_data_that_json_cannot_hold_is_refused_before_anything_is_written(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, make(config(), mesh), config(), {"bad": object()}, keep_last=1, mesh=mesh)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_in_words(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save a checkpoint in .*file"):
        save(tmp_path / "file", 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)


def test_the_full_disk_error_is_the_systems_own() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    assert "is full" in str(saver.explain(error, Path("/nowhere"), 10))


class Disk:
    """A disk whose shard files wait to be written until it is told to go on, or fails them."""

    def __init__(self) -> None:
        self.asked, self.go_on, self.full = threading.Event(), threading.Event(), False

    def open(self, file: Any, mode: str = "r", *args: Any) -> Any:
        if not str(file).endswith(".distcp"):
            return builtins.open(file, mode, *args)
        self.asked.set()
        assert self.go_on.wait(60)
        return builtins.open("/dev/full" if self.full else file, mode, *args)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    slow = Disk()
    monkeypatch.setattr(saver.filesystem_async, "open", slow.open, raising=False)
    yield slow
    slow.go_on.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_state_of_its_step(
    mesh: Mesh, tmp_path: Path, disk: Disk
) -> None:
    engine, background = make(config(), mesh), Saver(tmp_path, 2, mesh, background=True)
    train(engine, 0, 2)
    then = everything(engine)
    assert background.save(2, engine, config(), {"position": 8}) is None
    assert disk.asked.wait(60)
    rest = train(engine, 2, 2)
    assert background.poll() is None and latest(tmp_path) is None
    disk.go_on.set()
    assert background.finish() == tmp_path / "step_00000002"
    assert background.poll() is None and background.finish() is None

    resumed = make(config(), mesh, seed=1)
    assert load(tmp_path / "step_00000002", resumed, config(), mesh).extra == {"position": 8}
    found = everything(resumed)
    assert all(torch.equal(then[name], found[name]) for name in then)
    assert train(resumed, 2, 2) == rest


def test_polling_makes_a_checkpoint_of_what_has_been_written_once(mesh: Mesh, tmp_path: Path) -> None:
    engine, background = make(config(), mesh), Saver(tmp_path, 1, mesh, background=True)
    for step in (1, 2):
        background.save(step, engine, config(), {})
        assert background._pending is not None and background._pending._thread is not None
        background._pending._thread.join()
        assert background.poll() == tmp_path / f"step_{step:08d}" == latest(tmp_path)
        assert background.poll() is None
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def test_a_checkpoint_written_beside_the_training_is_the_one_written_at_once(
    mesh: Mesh, tmp_path: Path
) -> None:
    engine, contents = make(config(), mesh), []
    train(engine, 0, 1)
    for background in (True, False):
        writer = Saver(tmp_path / str(background), 1, mesh, background=background)
        path = writer.save(1, engine, config(), {}) or writer.finish()
        assert path is not None
        files = {p.name: p.read_bytes() for p in path.iterdir()}
        del files[".metadata"]  # a pickle that names the folder
        contents.append({name: data for name, data in files.items() if name != "checkpoint.json"})
    assert contents[0] == contents[1] and len(contents[0]) == 2


def test_a_disk_that_fills_up_beside_the_training_is_said_when_polled_and_the_last_checkpoint_stays(
    mesh: Mesh, tmp_path: Path, disk: Disk
) -> None:
    engine, background = make(config(), mesh), Saver(tmp_path, 2, mesh, background=True)
    disk.go_on.set()
    background.save(1, engine, config(), {})
    good = background.finish()
    disk.full = True
    background.save(2, engine, config(), {})
    with pytest.raises(CheckpointError, match="is full: .* Older checkpoints are untouched"):
        background.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert good is not None
    load(good, make(config(), mesh), config(), mesh)
    disk.full = False
    background.save(2, engine, config(), {})
    assert background.finish() == latest(tmp_path) == tmp_path / "step_00000002"


def test_a_wait_for_the_disk_is_progress_when_its_file_grows(
    mesh: Mesh, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "WAIT_S", 0.01)
    background, grew = Saver(tmp_path, 2, mesh, background=True), threading.Semaphore(0)
    background.on_progress = lambda: grew.release()
    background.save(1, make(config(), mesh), config(), {})
    assert disk.asked.wait(60) and background._pending is not None
    ((path, *_),) = background._pending._buckets
    waiting = threading.Thread(target=background.finish)
    waiting.start()
    assert not grew.acquire(timeout=0.2)  # nothing is on the disk yet
    Path(path).write_bytes(b"the first bytes")
    assert grew.acquire(timeout=60)
    assert not grew.acquire(timeout=0.2)  # and no more has come
    disk.go_on.set()
    waiting.join()
    assert latest(tmp_path) == tmp_path / "step_00000001"


def test_a_second_save_must_wait_for_the_first(mesh: Mesh, tmp_path: Path, disk: Disk) -> None:
    engine, background = make(config(), mesh), Saver(tmp_path, 2, mesh, background=True)
    background.save(1, engine, config(), {})
    with pytest.raises(AssertionError, match=r"still being written: call finish\(\) first"):
        background.save(2, engine, config(), {})
    disk.go_on.set()
    assert background.finish() == tmp_path / "step_00000001"


def test_a_save_that_fails_behind_its_last_file_leaves_nothing_to_the_next_one(
    mesh: Mesh, tmp_path: Path
) -> None:
    larger = precise("fp64", False)  # its table of contents would not fit the next checkpoint's files
    failing = Saver(tmp_path, 2, mesh, background=True)
    failing.save(1, make(larger, mesh), larger, {})
    (temporary,) = tmp_path.glob(".tmp_*")
    (temporary / ".reserve").unlink()
    with pytest.raises(CheckpointError, match="cannot save a checkpoint"):
        failing.finish()
    engine = make(config(), mesh)
    train(engine, 0, 2)
    path = save(tmp_path, 2, engine, config(), {}, keep_last=2, mesh=mesh)
    resumed = make(config(), mesh, seed=1)
    load(path, resumed, config(), mesh)
    before, after = everything(engine), everything(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_start_removes_what_a_killed_run_left_and_nothing_else(mesh: Mesh, tmp_path: Path) -> None:
    good = save(tmp_path, 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)
    (tmp_path / ".tmp_step_00000002").mkdir()
    (tmp_path / ".tmp_step_00000002" / "__0_0.distcp").write_bytes(b"half")
    Saver(tmp_path, 1, mesh, background=True)
    assert list(tmp_path.iterdir()) == [good]


def test_writing_does_not_turn_the_garbage_collector_off(mesh: Mesh, tmp_path: Path, disk: Disk) -> None:
    background = Saver(tmp_path, 1, mesh, background=True)
    background.save(1, make(config(), mesh), config(), {})
    assert disk.asked.wait(60) and gc.isenabled()
    disk.go_on.set()
    background.finish()


def test_whatever_goes_wrong_while_writing_is_a_checkpoint_error(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such number")

    monkeypatch.setattr(saver.filesystem_async, "_write_item", broken)
    with pytest.raises(CheckpointError, match="cannot save .*: RuntimeError: no such number. Older"):
        save(tmp_path, 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)
    assert not list(tmp_path.iterdir())


@pytest.mark.multi
@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_said_by_all_and_nothing_is_lost(
    torchrun: Callable[..., str], tmp_path: Path
) -> None:
    torchrun(Path(__file__).parent / "ranks_saver.py", tmp_path)


@pytest.mark.parametrize(("ranks", "error"), [(1, CheckpointError), (2, RankOutOfStep)])
def test_a_rank_that_fails_amid_megatrons_messages_ends_instead_of_going_on_out_of_step(
    tmp_path, ranks, error
):
    mesh: Any = SimpleNamespace(
        rank=0, world_size=ranks, gather_objects=lambda mine: [mine], broadcast_object=lambda value: value
    )
    temporary = tmp_path / ".tmp_1_step_00000001"
    temporary.mkdir()
    (temporary / ".reserve").touch()
    pending = _Save(temporary, {"step": 1}, 0, mesh, lambda: None)

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    pending._request = SimpleNamespace(finalize_fns=[fail])
    with pytest.raises(error, match="Input/output error.*Older checkpoints are untouched"):
        pending.complete()
