"""FP8 on the local layers: which linears, what moves from step to step, and that training goes on as well.

The arithmetic itself is in test_fp8_emulation.py, several ranks in test_ranks.py.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iomm.bench.fp8 import bench_fp8
from iomm.checkpoint import sharded
from iomm.config import Config, Fp8Config, ParallelConfig
from iomm.parallel import fp8
from iomm.parallel.engine import Engine
from iomm.parallel.fp8 import finish_fp8_step, fp8_state, load_fp8_state, use_fp8
from iomm.parallel.mesh import Mesh
from tests.checkpoint import small_engine
from tests.model.small_models import FLUX, Z_IMAGE, inputs, make, perturbed
from tests.small_run import small_config

KEEP = ("image_in*", "condition_in*", "out*", "time*", "*modulation*")  # the defaults, without "generator."


def model(config: Any = FLUX, **settings: Any) -> tuple[nn.Module, list[str]]:
    made = perturbed(make(config, torch.float32))
    return made, use_fp8(made, Fp8Config(**({"keep": KEEP} | settings)))


def test_the_products_of_the_blocks_are_quantized_and_the_embeddings_kept() -> None:
    _, names = model(recipe="current")
    assert "double_blocks.0.image.qkv.weight" in names and "single_blocks.1.mlp_out.weight" in names
    matrices = {n.split(".", 2)[2] for n in names if n.startswith("double_blocks.0")}
    products = ("qkv", "attention_out", "mlp.first", "mlp.second")
    assert matrices == {f"{stream}.{p}.weight" for stream in ("image", "condition") for p in products}
    assert all(n.startswith(("double_blocks", "single_blocks")) and "modulation" not in n for n in names)
    _, names = model(Z_IMAGE, recipe="current")
    assert {n.rsplit(".", 2)[1] for n in names} == {"qkv", "attention_out", "gate", "up", "down"}


def test_the_defaults_fit_the_names_of_a_whole_system() -> None:
    assert tuple(f"generator.{p}" if not p.startswith("*") else p for p in KEEP) == Fp8Config().keep


@torch.no_grad()
@pytest.mark.parametrize("config", [FLUX, Z_IMAGE])
def test_a_model_changes_a_little_and_one_that_keeps_everything_not_at_all(config: Any) -> None:
    given = inputs()
    whole = perturbed(make(config, torch.float32))(*given)
    kept, names = model(config, recipe="delayed", keep=("*",))
    assert names == [] and kept(*given).equal(whole)
    for recipe in ("current", "blockwise"):
        quantized = model(config, recipe=recipe)[0](*given)
        error = float((quantized - whole).norm() / whole.norm())
        assert 1e-4 < error < 0.1, recipe


def test_without_a_recipe_nothing_is_touched() -> None:
    made, names = model(recipe="none")
    assert names == [] and fp8_state(made) == {}


def test_weights_in_8_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="fp8_param=false: weights are then quantized as they are read"):
        model(recipe="current", fp8_param=True)


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise"])
def test_a_state_dict_is_the_same_with_fp8(recipe: str) -> None:
    plain, quantized = make(FLUX, torch.float32), model(recipe=recipe)[0]
    assert list(quantized.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in quantized.named_parameters()] == [n for n, _ in plain.named_parameters()]
    quantized.load_state_dict(plain.state_dict(), strict=True)


def test_an_emulation_says_that_it_is_one(caplog: pytest.LogCaptureFixture) -> None:
    fp8._say.cache_clear()
    model(recipe="current")
    assert "emulated for 24 linears" in caplog.text and "parallel.backend=te" in caplog.text


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_number_and_no_scale(recompute: Any) -> None:
    found = []
    for mode in ("none", recompute):
        made = perturbed(make(FLUX, torch.float32, parallel=ParallelConfig(recompute=mode)))
        use_fp8(made, Fp8Config(recipe="delayed", keep=KEEP, amax_history=4))
        out = made(*inputs())
        out.square().sum().backward()
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        found.append([out.detach(), *gradients, *fp8_state(made).values()])
    assert all(ours.equal(theirs) for ours, theirs in zip(*found, strict=True))
    assert any(value[0].any() for value in found[0] if value.shape == (4, 3)), "nothing was recorded"


def an_engine(mesh: Mesh, history: int = 8, recipe: str = "delayed") -> tuple[Config, Engine]:
    settings = Fp8Config(recipe=recipe, keep=(), amax_history=history)  # type: ignore[arg-type]
    config = small_engine.config(fp8=settings)
    engine = small_engine.make(config, mesh)
    use_fp8(engine.module, settings)
    return config, engine


def test_a_step_moves_the_scales_by_the_largest_value_of_its_micro_batches(mesh: Mesh) -> None:
    _, engine = an_engine(mesh)
    weight = next(engine.module.parameters()).detach().abs().max()
    seen: list[Tensor] = []
    engine.module[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].abs().max()))  # type: ignore[index]
    small_engine.train(engine, 0, 1)
    state = fp8_state(engine.module)
    assert set(state) == {f"{i}.{key}" for i in (0, 2) for key in ("amax_history", "scale")}
    newest = state["0.amax_history"][-1]
    assert newest[0] == max(seen) and newest[1] == weight and newest[2] > 0
    torch.testing.assert_close(state["0.scale"][:2], 448 / newest[:2])
    assert not state["0.amax_history"][0].any()


def test_a_skipped_step_is_not_remembered(mesh: Mesh) -> None:
    _, engine = an_engine(mesh)
    small_engine.train(engine, 0, 2)
    before = {name: value.clone() for name, value in fp8_state(engine.module).items()}
    result = engine.step(small_engine.forward, [torch.full((3, small_engine.HIDDEN), float("nan"))] * 2)
    assert result.skipped
    for name, value in fp8_state(engine.module).items():
        assert value.equal(before[name]), name


def test_a_checkpoint_goes_on_bit_for_bit_with_its_scales(mesh: Mesh, tmp_path: Path) -> None:
    config, engine = an_engine(mesh)
    small_engine.train(engine, 0, 3)
    path = sharded.save(tmp_path, 3, engine, config, {}, 2, mesh)
    expected = small_engine.train(engine, 3, 2)
    _, opened = an_engine(mesh)
    sharded.load(path, opened, config, mesh)
    assert small_engine.train(opened, 3, 2) == expected
    for name, value in fp8_state(engine.module).items():
        assert fp8_state(opened.module)[name].equal(value), name


def test_a_checkpoint_without_scales_starts_them_anew_and_says_so(
    mesh: Mesh, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, engine = an_engine(mesh, recipe="current")
    path = sharded.save(tmp_path, 3, engine, config, {}, 2, mesh)
    _, opened = an_engine(mesh)
    sharded.load(path, opened, config, mesh)
    assert "2 linears start without a history of FP8 scales" in caplog.text
    assert fp8_state(opened.module)["0.scale"].tolist() == [1.0, 1.0, 1.0]


def test_a_history_of_another_length_and_a_missing_one_are_taken_over_as_far_as_they_go(mesh: Mesh) -> None:
    _, engine = an_engine(mesh, history=8)
    small_engine.train(engine, 0, 3)
    state = {name: value.clone() for name, value in fp8_state(engine.module).items()}
    _, shorter = an_engine(mesh, history=3)
    load_fp8_state(shorter.module, {name: value for name, value in state.items() if name.startswith("0.")})
    taken = fp8_state(shorter.module)
    assert taken["0.amax_history"][1:].equal(state["0.amax_history"][-2:])
    assert taken["0.scale"].equal(state["0.scale"])
    assert taken["2.scale"].tolist() == [1.0, 1.0, 1.0]


def test_a_model_without_delayed_scales_has_nothing_to_move(mesh: Mesh) -> None:
    made, _ = model(recipe="blockwise")
    finish_fp8_step(made, mesh)
    assert fp8_state(made) == {}


@pytest.mark.slow
def test_twenty_steps_end_within_three_percent_of_the_loss_without_fp8(world: Path, tmp_path: Path) -> None:
    config = small_config(world, tmp_path, train__steps=20, optimizer__ema_decay=None)
    config = dataclasses.replace(config, fp8=Fp8Config(amax_history=16))
    printed = bench_fp8(config)
    change = json.loads(printed.splitlines()[-1])["loss_change"]
    assert list(change) == ["none", "delayed", "current", "blockwise"]
    assert change.pop("none") == 0
    assert all(0 < abs(value) < 0.03 for value in change.values()), printed
