"""Rates by group, and Muon, in one process; layouts are in test_layouts.py."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iomm.config import OptimizerConfig, OptimizerGroup, ParallelConfig, TrainConfig
from iomm.parallel import muon
from iomm.parallel.backend import transformer_config
from iomm.parallel.engine import Engine
from iomm.parallel.masters import state_tensors
from iomm.parallel.mesh import Mesh

HIDDEN, HEADS = 8, 2
PLAIN = ParallelConfig(distributed_optimizer=False)
TRAIN = TrainConfig(steps=10, global_batch_images=1, micro_batch_images=1, precision="fp32")
MUON = OptimizerConfig(
    kind="muon", lr=0.1, warmup_steps=0, clip_norm=0.0, weight_decay=0.5, betas=(0.9, 0.95)
)
QUINTIC = (  # the package's coefficients: modded-nanogpt's, five steps
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Toy(nn.Module):
    """Names as in the model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"image_in": (HIDDEN, 4), "qkv": (3 * HIDDEN, HIDDEN), "mlp": (HIDDEN, 3 * HIDDEN)}
        self.generator, self.conditioner = nn.Module(), nn.Module()
        for name, (rows, columns) in shapes.items():
            self.generator.add_module(name, nn.Linear(columns, rows))
        self.conditioner.add_module("qkv", nn.Linear(HIDDEN, 3 * HIDDEN))
        for weight in self.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)

    def forward(self, x_BC: Tensor) -> Tensor:
        g: Any = self.generator
        c: Any = self.conditioner
        h = g.image_in(x_BC)
        return g.mlp(g.qkv(h).tanh() + c.qkv(h).sin())


def forward(toy: nn.Module, _: Tensor | None, x_BC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return toy(x_BC).square().mean(), {}


def engine(mesh: Mesh, optimizer: OptimizerConfig, train: TrainConfig = TRAIN) -> Engine:
    config = transformer_config(HIDDEN, HEADS, torch.float32, mesh, PLAIN)
    return Engine(Toy(), config, optimizer, train, PLAIN, mesh)


def x_BC(step: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step))


def orthogonal(u: Tensor) -> Tensor:
    """Newton-Schulz, written out."""
    tall = u.shape[0] > u.shape[1]
    x = (u.T if tall else u) / u.norm().clamp_min(1e-7)
    for a, b, c in QUINTIC:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def test_two_steps_of_muon_are_those_written_out(mesh: Mesh) -> None:
    made, theirs = engine(mesh, MUON), Toy()
    momenta = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs.get_parameter("generator.image_in.weight")], "weight_decay": 0.5},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.9, 0.95),
    )
    for step in range(2):
        made.step(forward, [x_BC(step)])
        theirs.zero_grad()
        forward(theirs, None, x_BC(step))[0].backward()
        adamw.step()
        with torch.no_grad():
            for name in ("generator.qkv.weight", "generator.mlp.weight", "conditioner.qkv.weight"):
                weight = theirs.get_parameter(name)
                assert weight.grad is not None
                momenta[name].lerp_(weight.grad, 0.05)
                u = weight.grad.lerp(momenta[name], 0.95)
                if name == "generator.qkv.weight":  # rows (head, q | k | v, channel)
                    parts = u.view(HEADS, 3, -1, HIDDEN).unbind(1)
                    parts = [orthogonal(p.reshape(HIDDEN, HIDDEN)).view(HEADS, -1, HIDDEN) for p in parts]
                    update, longest = torch.stack(parts, 1).reshape(u.shape), HIDDEN
                elif name == "conditioner.qkv.weight":  # rows (q | k | v, head, channel)
                    update, longest = torch.cat([orthogonal(p) for p in u.chunk(3)]), HIDDEN
                else:
                    update, longest = orthogonal(u), max(u.shape)
                weight.mul_(1 - 0.1 * 0.5).sub_(0.1 * 0.2 * longest**0.5 * update)
    for (name, mine), wanted in zip(made.module.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_muon_keeps_momenta_of_hidden_matrices_and_adamw_the_moments_of_the_rest(mesh: Mesh) -> None:
    made = engine(mesh, MUON)
    made.step(forward, [x_BC(0)])
    state = state_tensors(made._optimizer.pieces)
    hidden = {"generator.qkv.weight", "generator.mlp.weight", "conditioner.qkv.weight"}
    rest = dict(made.module.named_parameters()).keys() - hidden
    assert {key: tensors.keys() for key, tensors in state.items()} == {
        "momentum_buffer": hidden,
        "exp_avg": rest,
        "exp_avg_sq": rest,
    }


@pytest.mark.parametrize(
    ("name", "is_hidden"),
    [
        ("generator.double_blocks.0.image.qkv.weight", True),
        ("generator.single_blocks.11.mlp.down.weight", True),
        ("generator.noise_refiner.0.attention_out.weight", True),
        ("conditioner.connector.layers.0.mlp_in.weight", True),
        ("conditioner.adapter.query.weight", True),
        ("conditioner.adapter.queries", False),
        ("generator.double_blocks.0.image.modulation.linear.weight", False),
        ("generator.out_modulation.weight", False),
        ("generator.time.first.weight", False),
        ("generator.image_in.weight", False),
        ("generator.condition_in.weight", False),
        ("generator.out.weight", False),
    ],
)
def test_matrices_between_hidden_vectors_are_muons(name: str, is_hidden: bool) -> None:
    weight = nn.Parameter(torch.zeros(12, 4))
    muon.mark({weight: name}, head_size=2, sharded=False)
    assert getattr(weight, "is_embedding_or_output_parameter", False) is not is_hidden


def test_groups_change_the_rate_and_the_decay_of_what_they_match_and_the_first_counts(mesh: Mesh) -> None:
    groups = (
        OptimizerGroup(match="conditioner.*", lr_scale=0.5, weight_decay=0.0),
        OptimizerGroup(match="*.qkv.*", lr_scale=3.0),
    )
    optimizer = OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=0.0, weight_decay=0.5, groups=groups)
    made, theirs = engine(mesh, optimizer), Toy()
    weights = dict(theirs.named_parameters())

    def group(names: list[str], lr: float, decay: float) -> dict[str, Any]:
        return {"params": [weights.pop(name) for name in names], "lr": lr, "weight_decay": decay}

    adamw = torch.optim.AdamW(
        [
            group(["conditioner.qkv.weight", "conditioner.qkv.bias"], 0.05, 0.0),
            group(["generator.qkv.weight"], 0.3, 0.5),
            group(["generator.qkv.bias"], 0.3, 0.0),
            group(["generator.image_in.weight", "generator.mlp.weight"], 0.1, 0.5),
            group(["generator.image_in.bias", "generator.mlp.bias"], 0.1, 0.0),
        ],
        betas=(0.9, 0.95),
    )
    assert not weights
    for step in range(2):
        assert made.step(forward, [x_BC(step)]).lr == pytest.approx(0.1)
        theirs.zero_grad()
        forward(theirs, None, x_BC(step))[0].backward()
        adamw.step()
    for (name, mine), wanted in zip(made.module.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_a_group_that_fits_nothing_is_named(mesh: Mesh) -> None:
    groups = (OptimizerGroup(match="conditioner.*"), OptimizerGroup(match="conditioner.qkv.*"))
    with pytest.raises(ValueError, match=r'no weight is left for the pattern "conditioner.qkv.\*"'):
        engine(mesh, OptimizerConfig(warmup_steps=0, groups=groups))


@pytest.mark.parametrize(
    ("precision", "sharded", "message"),
    [
        ("fp64", False, "muon orthogonalises in fp32, train.precision is fp64. Set train.precision=fp32"),
        ("fp32", True, "works in bf16 only .* Set parallel.distributed_optimizer=false"),
    ],
)
def test_what_muon_cannot_do_is_refused_with_the_way_out(precision: Any, sharded: bool, message: str) -> None:
    parallel = ParallelConfig(distributed_optimizer=sharded)
    with pytest.raises(ValueError, match=message):
        muon.check(MUON, dataclasses.replace(TRAIN, precision=precision), parallel)
