"""One optimizer step in one process; two ranks are in test_ranks.py."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iomm.config import OptimizerConfig, ParallelConfig, TrainConfig
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.engine import DTYPES, Engine
from iomm.parallel.masters import state_tensors
from iomm.parallel.mesh import Mesh

HIDDEN = 4
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.1, clip_norm=1.0, ema_decay=None)
TRAIN = TrainConfig(steps=10, global_batch_images=4, micro_batch_images=2, precision="fp64")
PLAIN = ParallelConfig(distributed_optimizer=False)


def module(mesh: Mesh, dtype: torch.dtype = torch.float64) -> nn.Module:
    layers = Layers(transformer_config(HIDDEN, 1, dtype, mesh, PLAIN), mesh)
    made = nn.Sequential(layers.column(HIDDEN, 8), nn.Tanh(), layers.row(8, HIDDEN))
    generator = torch.Generator().manual_seed(0)
    for weight in made.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return made


def engine(
    mesh: Mesh,
    optimizer: OptimizerConfig = OPTIMIZER,
    train: TrainConfig = TRAIN,
    parallel: ParallelConfig = PLAIN,
) -> Engine:
    dtype = DTYPES[train.precision]
    config = transformer_config(HIDDEN, 1, dtype, mesh, parallel)
    return Engine(module(mesh, dtype), config, optimizer, train, parallel, mesh)


def forward(model: nn.Module, _: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (model(x_BD) - x_BD.flip(-1)).square().mean()
    return loss, {"twice": 2 * loss}


def batches(step: int, count: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, HIDDEN, generator=generator).to(dtype) for _ in range(count)]


def snapshot(made: Engine) -> list[Tensor]:
    ema = list(made.ema.weights.values()) if made.ema else []
    moments = [t for tensors in state_tensors(made._optimizer.pieces).values() for t in tensors.values()]
    return [t.detach().clone() for t in (*made.module.parameters(), *ema, *moments)]


def test_steps_are_those_of_torchs_adamw_with_clipping(mesh: Mesh) -> None:
    ours, theirs = engine(mesh), module(mesh)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(4):
        result = ours.step(forward, batches(step))
        reference.zero_grad()
        loss = sum((forward(theirs, None, x)[0] for x in batches(step)), torch.zeros(())) / 2
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-8)
        assert result.metrics["twice"] == pytest.approx(2 * loss.item(), rel=1e-8)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-12)
    for mine, wanted in zip(ours.module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("precision", "distributed"), [("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)]
)
def test_other_precisions_follow_the_double_precision_run(
    mesh: Mesh, precision: Any, distributed: bool
) -> None:
    parallel = ParallelConfig(distributed_optimizer=distributed)
    low = engine(mesh, train=dataclasses.replace(TRAIN, precision=precision), parallel=parallel)
    high = engine(mesh)
    tolerance = 1e-5 if precision == "fp32" else 0.1
    for step in range(4):
        wanted = high.step(forward, batches(step))
        result = low.step(forward, batches(step, dtype=DTYPES[precision]))
        assert result.loss == pytest.approx(wanted.loss, rel=tolerance)
    assert {p.dtype for p in low.module.parameters()} == {DTYPES[precision]}


@pytest.mark.parametrize(("precision", "fused"), [("bf16", False), ("fp32", True)])
def test_a_step_in_bf16_on_a_cpu_has_the_plain_attention(mesh: Mesh, precision: Any, fused: bool) -> None:
    seen = []

    def attend(model: nn.Module, _: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q = model(x_BD)[None, None]
        attended = nn.functional.scaled_dot_product_attention(q, q, q)
        seen.append("FlashAttention" in str(attended.grad_fn))
        return attended.float().square().mean(), {}

    made = engine(mesh, train=dataclasses.replace(TRAIN, precision=precision))
    made.step(attend, batches(0, dtype=DTYPES[precision]))
    assert seen == [fused, fused]


def test_the_step_does_not_depend_on_how_the_batch_is_cut(mesh: Mesh) -> None:
    whole, cut = engine(mesh), engine(mesh)
    x_BD = torch.cat(batches(0))
    for _ in range(2):
        one = whole.step(forward, [x_BD])
        many = cut.step(forward, x_BD.split(1))
    assert one.loss == pytest.approx(many.loss, rel=1e-12)
    for a, b in zip(whole.module.parameters(), cut.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(
    mesh: Mesh, bad: float, distributed: bool
) -> None:
    train = dataclasses.replace(TRAIN, precision="fp32")
    optimizer = dataclasses.replace(OPTIMIZER, ema_decay=0.9)
    parallel = ParallelConfig(distributed_optimizer=distributed)
    made, other = (engine(mesh, optimizer, train, parallel) for _ in range(2))
    for each in (made, other):
        each.step(forward, batches(0, dtype=torch.float32))
    before = snapshot(made)
    good, poisoned = batches(1, dtype=torch.float32)
    result = made.step(forward, [good, poisoned * bad])
    assert result.skipped and not math.isfinite(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(made), strict=True))
    for each in (made, other):
        assert not each.step(forward, batches(2, dtype=torch.float32)).skipped
    assert all(torch.equal(a, b) for a, b in zip(snapshot(made), snapshot(other), strict=True))


def test_a_bad_gradient_with_a_good_loss_is_skipped_too(mesh: Mesh) -> None:
    made = engine(mesh)
    before = snapshot(made)

    def root_at_zero(model: nn.Module, _: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (model(x_BD) * 0).square().sum().sqrt(), {}

    result = made.step(root_at_zero, batches(0))
    assert result.skipped and result.loss == 0.0 and not math.isfinite(result.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(made), strict=True))


def test_the_learning_rate_is_a_function_of_the_step_number_also_over_skipped_steps(mesh: Mesh) -> None:
    optimizer = dataclasses.replace(OPTIMIZER, lr=1.0, min_lr=0.1, warmup_steps=4, schedule="cosine")
    made = engine(mesh, optimizer)
    poison = [torch.full((3, HIDDEN), math.nan, dtype=torch.float64)]
    rates = [made.step(forward, poison).lr for _ in range(10)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(1, 7)]
    assert rates[4:] == pytest.approx(cosine)
    assert made.steps_done == 10


def test_a_constant_schedule_may_warm_up_longer_than_the_run(mesh: Mesh) -> None:
    made = engine(mesh, dataclasses.replace(OPTIMIZER, warmup_steps=1000))
    assert made.step(forward, batches(0)).lr == pytest.approx(1e-5)


def test_frozen_parameters_stay(mesh: Mesh) -> None:
    model = module(mesh)
    model[0].requires_grad_(False)  # type: ignore[index]
    before = model[0].weight.clone()  # type: ignore[index]
    made = Engine(
        model, transformer_config(HIDDEN, 1, torch.float64, mesh, PLAIN), OPTIMIZER, TRAIN, PLAIN, mesh
    )
    made.step(forward, batches(0))
    assert torch.equal(model[0].weight, before)  # type: ignore[index]


def test_the_loss_of_the_caller_is_not_written_to(mesh: Mesh) -> None:
    kept: list[Tensor] = []

    def remember(model: nn.Module, _: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        kept.append(forward(model, None, x_BD)[0].exp())  # exp needs its result for the backward pass
        return kept[-1], {"same": kept[-1]}

    result = engine(mesh).step(remember, batches(0, 4))
    mean = sum(t.item() for t in kept) / 4
    assert result.loss == pytest.approx(mean, rel=1e-12) and result.metrics["same"] == result.loss


def test_a_step_without_a_micro_batch_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="at least one micro-batch. Raise train.global_batch_images"):
        engine(mesh).step(forward, [])


def test_metrics_that_come_and_go_are_named(mesh: Mesh) -> None:
    names: Iterator[str] = iter("ab")

    def fickle(model: nn.Module, _: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return forward(model, None, x_BD)[0], {next(names): torch.zeros(())}

    with pytest.raises(ValueError, match="metrics differ between micro-batches"):
        engine(mesh).step(fickle, batches(0))


@pytest.mark.parametrize(
    ("optimizer", "train", "parallel", "message"),
    [
        (
            {},
            {},
            {"distributed_optimizer": True},
            "precision = fp64 does not work .* Set parallel.distributed_opt",
        ),
        ({"schedule": "cosine", "warmup_steps": 10}, {}, {}, "warmup_steps 10 leaves no step of the 10"),
        ({"ema_decay": 1.0}, {}, {}, r"ema_decay 1.0 must lie in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_way_out(
    mesh: Mesh, optimizer: dict[str, Any], train: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine(
            mesh,
            dataclasses.replace(OPTIMIZER, **optimizer),
            dataclasses.replace(TRAIN, **train),
            dataclasses.replace(PLAIN, **parallel),
        )


def test_a_module_with_nothing_to_train_is_refused(mesh: Mesh) -> None:
    frozen = module(mesh).requires_grad_(False)
    config = transformer_config(HIDDEN, 1, torch.float64, mesh, PLAIN)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Engine(frozen, config, OPTIMIZER, TRAIN, PLAIN, mesh)
