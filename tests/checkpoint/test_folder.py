"""Which folder is a checkpoint, and whether it may be used."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iomm.checkpoint.folder import (
    CheckpointError,
    check_architecture,
    check_files,
    check_names,
    complete,
    find,
    latest,
    name_of,
    prune,
    publish,
    read_info,
    remove_leftovers,
    run_of,
    write_info,
)
from iomm.config import CodecConfig, Config, DataConfig, GeneratorConfig, MllmConfig, TrainConfig


def config() -> Config:
    return Config(
        name="test",
        generator=GeneratorConfig(
            hidden_size=256, heads=4, double_blocks=2, rope_axes=(16, 24, 24), condition_width=64
        ),
        mllm=MllmConfig(path="here/mllm"),
        codec=CodecConfig(path="here/vae"),
        data=DataConfig(images=("*.tar",)),
        train=TrainConfig(steps=8, global_batch_images=4, micro_batch_images=2),
    )


def checkpoint(folder: Path, step: int, **info: Any) -> Path:
    path = folder / name_of(step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"12345")
    values = {"step": step, "config": config().to_dict(), "extra": {}, "has_ema": True, "iomm_version": "0"}
    write_info(path, values | info)
    return path


def test_the_newest_complete_checkpoint_is_picked_by_number(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 10):
        checkpoint(tmp_path, step)
    assert latest(tmp_path) == tmp_path / "step_100000000"
    assert [p.name for p in complete(tmp_path)] == ["step_00000009", "step_00000010", "step_100000000"]


def test_torn_and_foreign_folders_are_never_picked(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 1)
    (tmp_path / name_of(2)).mkdir()  # no checkpoint.json
    checkpoint(tmp_path, 3).rename(tmp_path / ".tmp_step_00000003")
    checkpoint(tmp_path, 4).rename(tmp_path / "step_00000004.bak")
    assert latest(tmp_path) == good


def test_a_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None


def test_a_run_its_checkpoints_and_one_checkpoint_all_name_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run" / "checkpoints", 5)
    assert find(tmp_path / "run") == find(tmp_path / "run" / "checkpoints") == find(path) == path


def test_a_checkpoint_knows_its_run_unless_it_lies_by_itself(tmp_path: Path) -> None:
    inside = checkpoint(tmp_path / "run" / "checkpoints", 3)
    assert run_of(inside) == run_of(tmp_path / "run") == tmp_path / "run"
    assert run_of(checkpoint(tmp_path / "copies", 3)) is None


def test_a_path_without_a_checkpoint_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is no checkpoint and holds none. Name a step_... folder, or a run"
    ):
        find(tmp_path)


def test_information_comes_back_as_it_was_written(tmp_path: Path) -> None:
    info = read_info(checkpoint(tmp_path, 7, extra={"position": 3}))
    assert (info.step, info.extra, info.has_ema, info.files) == (
        7,
        {"position": 3},
        True,
        {"__0_0.distcp": 5},
    )
    assert Config.from_dict(info.config) == config()


def test_an_unreadable_or_foreign_description_is_an_error_in_words(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="checkpoint.json cannot be read: .* Use an older checkpoint"):
        read_info(path)
    (path / "checkpoint.json").write_text(json.dumps({"format": 99, "iomm_version": "9.9"}))
    with pytest.raises(CheckpointError, match="has format 99, this iomm reads 1. It was saved by iomm 9.9"):
        read_info(path)
    (path / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_info(path)


def test_a_missing_or_short_shard_is_named(tmp_path: Path) -> None:
    info = read_info(checkpoint(tmp_path, 1))
    check_files(info)
    shard = info.path / "__0_0.distcp"
    shard.write_bytes(b"123")
    with pytest.raises(CheckpointError, match="__0_0.distcp has 3 bytes instead of 5. Restore the file"):
        check_files(info)
    shard.unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing"):
        check_files(info)


def test_a_file_that_only_this_machine_does_not_see_is_named(tmp_path: Path) -> None:
    info = read_info(checkpoint(tmp_path, 1))
    check_names(info)
    (info.path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"does not see __0_0.distcp of .*: put it on a disk that they"):
        check_names(info)


def test_publishing_replaces_a_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    final = checkpoint(tmp_path, 1, extra={"run": "old"})
    new = checkpoint(tmp_path / "elsewhere", 1, extra={"run": "new"})
    temporary = new.rename(tmp_path / ".tmp_step_00000001")
    publish(temporary, final)
    assert read_info(final).extra == {"run": "new"}
    assert not list(tmp_path.glob(".tmp_*"))


def test_pruning_keeps_the_newest_and_nothing_half_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    prune(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name_of(3), name_of(4)]


def test_leftovers_go_and_checkpoints_stay(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2).rename(tmp_path / ".tmp_step_00000002")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [good]


def _change(section: str, **values: Any) -> Config:
    base = config()
    return dataclasses.replace(base, **{section: dataclasses.replace(getattr(base, section), **values)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (_change("generator", hidden_size=512, rope_axes=(32, 48, 48)), "generator."),
        (_change("generator", predict="clean"), "has generator.predict = velocity, this run clean"),
        (
            _change("generator", mlp_ratio=2.0),
            "has generator.mlp_ratio = 4.0, this run 2.0. Set generator.mlp_ratio to",
        ),
        (_change("condition", queries=16), "has condition.queries = 256, this run 16"),
        (_change("condition", condition_tokens="all"), "condition.condition_tokens"),
        (_change("codec", patch=1), "has codec.patch = 2, this run 1"),
        (_change("mllm", path="there/other"), "has mllm.path = here/mllm, this run there/other"),
    ],
)
def test_another_architecture_is_refused_by_the_setting_that_differs(
    tmp_path: Path, changed: Config, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_architecture(read_info(checkpoint(tmp_path, 1)), changed)


@pytest.mark.parametrize(
    "changed",
    [
        _change("condition", mask_ratio=0.1, mask_mode="hide", null_probability=0.5, prefix_split=False),
        _change("mllm", path="elsewhere/mllm"),
        _change("train", steps=100, seed=5),
        _change("data", images=("other/*.tar",)),
    ],
)
def test_settings_that_are_not_architecture_may_change(tmp_path: Path, changed: Config) -> None:
    check_architecture(read_info(checkpoint(tmp_path, 1)), changed)


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(tmp_path: Path) -> None:
    info = read_info(checkpoint(tmp_path, 1))
    del info.config["generator"]["guidance_embedding"]
    check_architecture(info, config())
    with pytest.raises(CheckpointError, match="guidance_embedding"):
        check_architecture(info, _change("generator", guidance_embedding=True))
    info.config["generator"]["from_the_future"] = 1
    with pytest.raises(CheckpointError, match="from_the_future.*Use that version"):
        check_architecture(info, config())


def test_looking_at_checkpoints_does_not_import_torch() -> None:
    code = "import sys, iomm.checkpoint.folder; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
