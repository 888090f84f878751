"""Resuming and opening checkpoints in one process; several ranks are in tests/layouts."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.sharded import load, load_weights, save
from iomm.config import Config
from iomm.parallel.mesh import Mesh
from tests.checkpoint.small_engine import config, everything, make, precise, train


@pytest.mark.parametrize(
    ("precision", "distributed", "ema"),
    [
        ("fp32", True, 0.9),
        ("fp32", False, 0.9),
        ("fp64", False, 0.9),
        ("bf16", False, 0.9),
        ("bf16", True, 0.9),
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    mesh: Mesh, tmp_path: Path, precision: str, distributed: bool, ema: float | None
) -> None:
    settings = precise(precision, distributed, ema)
    straight = make(settings, mesh)
    first = train(straight, 0, 2)
    path = save(tmp_path, 2, straight, settings, {"position": 8}, keep_last=2, mesh=mesh)
    rest = train(straight, 2, 2)

    resumed = make(settings, mesh, seed=1)
    info = load(path, resumed, settings, mesh)
    assert (info.step, info.extra, resumed.steps_done) == (2, {"position": 8}, 2)
    assert train(resumed, 2, 2) == rest != first
    ours, theirs = everything(resumed), everything(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_checkpoint_is_refused_and_nothing_is_touched(mesh: Mesh, tmp_path: Path) -> None:
    path = save(tmp_path, 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    engine = make(config(), mesh, seed=1)
    train(engine, 0, 1)
    before = everything(engine)
    for attempt in (
        lambda: load(path, engine, config(), mesh),
        lambda: load_weights(path, engine.module, ema=False, mesh=mesh),
    ):
        with pytest.raises(CheckpointError, match=rf"is damaged: {shard.name} has .* bytes instead of"):
            attempt()
    after = everything(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def _other_architecture() -> Config:
    return config(generator=dataclasses.replace(config().generator, predict="clean"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_goes_on_with_its_optimizer_sharded_or_not_as_it_likes(
    mesh: Mesh, tmp_path: Path, precision: str, distributed: bool
) -> None:
    saved, loaded = (precise(precision, sharded) for sharded in (distributed, not distributed))
    straight = make(saved, mesh)
    train(straight, 0, 2)
    path = save(tmp_path, 2, straight, saved, {}, keep_last=1, mesh=mesh)
    resumed = make(loaded, mesh, seed=1)
    load(path, resumed, loaded, mesh)
    assert train(resumed, 2, 2) == train(straight, 2, 2)
    for ours, theirs in zip(resumed.module.parameters(), straight.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            _other_architecture,
            r"has generator.predict = velocity, this run clean. Set generator.predict to velocity",
        ),
        (lambda: precise("fp64", True), r"train.precision = fp32, this run has fp64"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_and_nothing_is_touched(
    mesh: Mesh, tmp_path: Path, other: Callable[[], Config], message: str
) -> None:
    path = save(tmp_path, 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)
    engine = make(config(), mesh, seed=1)
    train(engine, 0, 1)
    before = everything(engine)
    with pytest.raises(CheckpointError, match=message):
        load(path, engine, other(), mesh)
    after = everything(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_without_ema_is_refused_by_a_run_with_ema(mesh: Mesh, tmp_path: Path) -> None:
    plain = precise("fp32", True, ema=None)
    path = save(tmp_path, 1, make(plain, mesh), plain, {}, keep_last=1, mesh=mesh)
    with pytest.raises(
        CheckpointError, match=r"has no EMA, this run keeps one. Set optimizer.ema_decay=null"
    ):
        load(path, make(config(), mesh), config(), mesh)


@pytest.mark.parametrize("ema", [True, False])
def test_weights_alone_can_be_loaded_raw_or_averaged_in_another_precision(
    mesh: Mesh, tmp_path: Path, ema: bool
) -> None:
    engine = make(config(), mesh)
    train(engine, 0, 3)
    path = save(tmp_path, 3, engine, config(), {}, keep_last=1, mesh=mesh)
    module = make(precise("bf16", False), mesh, seed=1).module
    info = load_weights(path, module, ema=ema, mesh=mesh, config=config())
    assert info.step == 3
    assert engine.ema is not None
    saved = engine.ema.weights if ema else dict(engine.module.named_parameters())
    for name, weight in module.named_parameters():
        assert torch.equal(weight, saved[name].view_as(weight).to(torch.bfloat16))


def test_averaged_weights_that_were_not_saved_point_to_raw(mesh: Mesh, tmp_path: Path) -> None:
    plain = precise("fp32", True, ema=None)
    engine = make(plain, mesh)
    path = save(tmp_path, 1, engine, plain, {}, keep_last=1, mesh=mesh)
    with pytest.raises(CheckpointError, match="has no EMA .* --raw"):
        load_weights(path, engine.module, ema=True, mesh=mesh)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.Linear(8, 16)),
            r"weight 0.weight has shape \(32, 8\) in checkpoint .*, \(16, 8\) in this",
        ),
        (nn.Sequential(nn.Linear(8, 32), nn.Linear(8, 32)), r"has no weight 1.weight"),
    ],
)
def test_weights_of_another_architecture_are_named(
    mesh: Mesh, tmp_path: Path, module: nn.Module, message: str
) -> None:
    path = save(tmp_path, 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)
    before = {name: w.clone() for name, w in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(path, module, ema=False, mesh=mesh)
    assert all(torch.equal(before[name], w) for name, w in module.state_dict().items())


def _rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A checkpoint whose table of contents was changed, and nothing else."""
    table = path / ".metadata"
    contents = pickle.loads(table.read_bytes())
    change(contents.state_dict_metadata)
    table.write_bytes(pickle.dumps(contents))
    info = json.loads((path / "checkpoint.json").read_text())
    info["files"][".metadata"] = table.stat().st_size
    (path / "checkpoint.json").write_text(json.dumps(info))


def _reshape(entries: dict[str, Any], key: str) -> None:
    entries[key].size = torch.Size((1, *entries[key].size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries.pop("model.0.weight"), "has no weight 0.weight. It is of another archit"),
        (lambda entries: entries.pop("ema.2.weight"), "has no average of weight 2.weight"),
        (lambda entries: _reshape(entries, "model.0.weight"), r"weight 0.weight has shape \(1, 32, 8\) in"),
        (
            lambda entries: [
                entries.pop(k) for k in list(entries) if k.startswith("optimizer.state.exp_avg")
            ],
            r"has no optimizer\.state\.exp_avg.*another optimizer, or by an older.* --set train.init_from=",
        ),
    ],
)
def test_what_a_checkpoint_misses_is_named_and_nothing_is_touched(
    mesh: Mesh, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = save(tmp_path, 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)
    _rewritten(path, change)
    engine = make(config(), mesh, seed=1)
    train(engine, 0, 1)
    before = everything(engine)
    with pytest.raises(CheckpointError, match=message):
        load(path, engine, config(), mesh)
    after = everything(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
