"""A checkpoint is data: what its author put into the pickles that torch would load is refused, never run."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from iomm.checkpoint.contents import read_contents
from iomm.checkpoint.folder import CheckpointError, check_files, read_info
from iomm.checkpoint.sharded import load, load_weights, save
from iomm.checkpoint.streaming import ShardedReader, Spec, write_sharded
from iomm.parallel.mesh import Mesh
from tests.checkpoint.small_engine import config, everything, make, train


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(mesh: Mesh, tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints", 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)


def replace_file(checkpoint: Path, name: str, data: bytes) -> None:
    """Write a file of a checkpoint anew, as somebody would who wants it to be loaded."""
    (checkpoint / name).write_bytes(data)
    info = json.loads((checkpoint / "checkpoint.json").read_text())
    info["files"][name] = len(data)
    (checkpoint / "checkpoint.json").write_text(json.dumps(info))


def rewrite(checkpoint: Path, change: Callable[[Metadata], None]) -> None:
    table = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(table)
    replace_file(checkpoint, ".metadata", pickle.dumps(table))


def refused(checkpoint: Path, mesh: Mesh, message: str) -> None:
    """Neither resuming nor opening it for its weights works, and the engine is as it was."""
    engine = make(config(), mesh, seed=1)
    train(engine, 0, 1)
    before = everything(engine)
    for attempt in (
        lambda: load(checkpoint, engine, config(), mesh),
        lambda: load_weights(checkpoint, engine.module, ema=False, mesh=mesh),
    ):
        with pytest.raises(CheckpointError, match=message):
            attempt()
    after = everything(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_table_of_contents_is_the_one_that_torch_unpickles(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    specs = {"model.a": Spec((2, 3), torch.bfloat16), "model.b": Spec((), torch.float32)}
    write_sharded(tmp_path / "written", specs, lambda name: torch.ones(specs[name].shape))
    for folder in (saved, tmp_path / "written"):
        ours, theirs = read_contents(folder), FileSystemReader(folder).read_metadata()
        assert ours.state_dict_metadata == theirs.state_dict_metadata
        assert ours.storage_data == theirs.storage_data


def test_code_in_the_table_of_contents_is_refused_and_not_run(
    saved: Path, mesh: Mesh, tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    replace_file(saved, ".metadata", pickle.dumps(Touch(trap)))
    refused(saved, mesh, r"it names posix.mkdir, which no table .* Nothing in it was run")
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        ShardedReader(saved)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists()  # the trap works: torch would have run it


def test_code_hidden_in_an_entry_of_the_table_is_refused_and_not_run(
    saved: Path, mesh: Mesh, tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    rewrite(saved, lambda table: table.__dict__.update(planner_data=Touch(trap)))
    refused(saved, mesh, r"names posix\.mkdir")
    assert not trap.exists()


def test_code_in_the_common_state_is_refused_and_not_run(saved: Path, mesh: Mesh, tmp_path: Path) -> None:
    trap, shard = tmp_path / "trap", next(saved.glob("*.distcp"))
    hidden, old = io.BytesIO(), shard.read_bytes()
    torch.save([Touch(trap)], hidden)

    def point_there(table: Metadata) -> None:
        place = table.storage_data[MetadataIndex("common_state/shard_0_1")]
        place.offset, place.length = len(old), len(hidden.getvalue())

    rewrite(saved, point_there)
    replace_file(saved, shard.name, old + hidden.getvalue())
    with pytest.raises(CheckpointError, match=r"common_state/shard_0_1 in .* is no plain data"):
        load(saved, make(config(), mesh), config(), mesh)
    assert not trap.exists()


def test_an_object_that_is_no_plain_value_is_not_taken_from_the_common_state(saved: Path, mesh: Mesh) -> None:
    shard, hidden = next(saved.glob("*.distcp")), io.BytesIO()
    old = shard.read_bytes()
    torch.save([{"steps_done": torch.ones(1)}], hidden)

    def point_there(table: Metadata) -> None:
        place = table.storage_data[MetadataIndex("common_state/shard_0_1")]
        place.offset, place.length = len(old), len(hidden.getvalue())

    rewrite(saved, point_there)
    replace_file(saved, shard.name, old + hidden.getvalue())
    with pytest.raises(CheckpointError, match="holds a Tensor; only plain data is read"):
        load(saved, make(config(), mesh), config(), mesh)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", ".metadata", ""])
def test_a_table_that_points_out_of_its_folder_is_refused(saved: Path, mesh: Mesh, name: str) -> None:
    def point_out(table: Metadata) -> None:
        for place in table.storage_data.values():
            place.relative_path = name

    rewrite(saved, point_out)
    refused(saved, mesh, "it points to .*, which is no file in")


def test_a_torn_table_of_contents_is_refused(saved: Path) -> None:
    whole = (saved / ".metadata").read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (saved / ".metadata").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not the table of contents of a checkpoint"):
            read_contents(saved)


def test_no_name_in_a_table_reaches_the_object_of_that_name(saved: Path) -> None:
    """BUILD on a class would set its attributes: here it meets a record, and torch's class keeps its own."""
    attack = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}(X\x09\x00\x00\x00hijackedK\x01u\x86b."
    )
    (saved / ".metadata").write_bytes(attack)
    with pytest.raises(CheckpointError):
        read_contents(saved)
    assert not hasattr(Metadata, "hijacked")


def test_a_common_file_of_an_older_megatron_is_refused_because_its_loader_would_prefer_it(
    saved: Path,
) -> None:
    torch.save({}, saved / "common.pt")
    with pytest.raises(CheckpointError, match=r"has a common\.pt, which iomm never writes"):
        check_files(read_info(saved))
