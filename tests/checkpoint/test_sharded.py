"""Saving and resuming in one process; two ranks are in tests/parallel/test_ranks.py."""

import builtins
import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iomm.checkpoint import sharded
from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.sharded import latest, load, load_weights, read_info, save
from iomm.config import (
    CodecConfig,
    Config,
    DataConfig,
    GeneratorConfig,
    MllmConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.engine import DTYPES, Engine, StepResult
from iomm.parallel.mesh import Mesh

HIDDEN = 8


def config(**changes: Any) -> Config:
    base = Config(
        name="test",
        generator=GeneratorConfig(
            hidden_size=HIDDEN, heads=1, double_blocks=1, rope_axes=(2, 2, 4), condition_width=8
        ),
        mllm=MllmConfig(path="models/mllm"),
        codec=CodecConfig(path="models/vae"),
        data=DataConfig(images=("*.tar",)),
        train=TrainConfig(steps=8, global_batch_images=4, micro_batch_images=2, precision="fp32"),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, ema_decay=0.9, weight_decay=0.01),
    )
    return dataclasses.replace(base, **changes)


def precise(precision: Any, distributed: bool, ema: float | None = 0.9) -> Config:
    base = config()
    return config(
        train=dataclasses.replace(base.train, precision=precision),
        parallel=ParallelConfig(distributed_optimizer=distributed),
        optimizer=dataclasses.replace(base.optimizer, ema_decay=ema),
    )


def make(settings: Config, mesh: Mesh, seed: int = 0) -> Engine:
    dtype = DTYPES[settings.train.precision]
    transformer = transformer_config(HIDDEN, 1, dtype, mesh, settings.parallel)
    layers = Layers(transformer, mesh)
    module = nn.Sequential(layers.column(HIDDEN, 32), nn.Tanh(), layers.row(32, HIDDEN))
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    return Engine(module, transformer, settings.optimizer, settings.train, settings.parallel, mesh)


def forward(module: nn.Module, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (module(x_BD).float() - x_BD.flip(-1).float()).square().mean(), {}


def train(engine: Engine, first: int, count: int) -> list[StepResult]:
    dtype = next(engine.module.parameters()).dtype
    results = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        batches = [torch.randn(3, HIDDEN, generator=generator).to(dtype) for _ in range(2)]
        results.append(engine.step(forward, batches, 2))
    return results


def everything(engine: Engine) -> dict[str, Tensor]:
    """Weights, EMA and every tensor and number of the optimizer, by name."""
    found = {f"model.{n}": p.detach().clone() for n, p in engine.module.named_parameters()}
    found |= {f"ema.{n}": w.clone() for n, w in (engine.ema.weights if engine.ema else {}).items()}
    for part, chained in enumerate(engine._optimizer.chained_optimizers):
        for g, group in enumerate(chained.optimizer.param_groups):
            found[f"{part}.{g}.step"] = torch.tensor(group["step"])
            for i, parameter in enumerate(group["params"]):
                found[f"{part}.{g}.{i}"] = parameter.detach().clone()
                state = chained.optimizer.state[parameter]
                found |= {f"{part}.{g}.{i}.{key}": value.clone() for key, value in state.items()}
    return found


@pytest.mark.parametrize(
    ("precision", "distributed", "ema"),
    [
        ("fp32", True, 0.9),
        ("fp32", False, 0.9),
        ("fp64", False, 0.9),
        ("bf16", False, 0.9),
        ("bf16", True, None),
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
    monkeypatch.setattr(sharded.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
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
        broken.setattr(sharded.filesystem_async, "open", on_full_disk, raising=False)
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


def test_a_folder_that_cannot_be_written_is_an_error_in_words(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save a checkpoint in .*file"):
        save(tmp_path / "file", 1, make(config(), mesh), config(), {}, keep_last=1, mesh=mesh)


def _other_architecture() -> Config:
    return config(generator=dataclasses.replace(config().generator, predict="clean"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            _other_architecture,
            r"has generator.predict = velocity, this run clean. Set generator.predict to velocity",
        ),
        (lambda: precise("fp32", False), r"parallel.distributed_optimizer = True, this run has False"),
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
        assert torch.equal(weight, saved[name].to(torch.bfloat16))


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


def test_the_full_disk_error_is_the_systems_own() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    assert "is full" in str(sharded._explain(error, Path("/nowhere"), 10))
