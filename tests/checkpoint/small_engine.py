"""An engine small enough for tests of checkpoints: two layers, trained on numbers that its step decides."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

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


def forward(module: nn.Module, carried: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    del carried
    return (module(x_BD).float() - x_BD.flip(-1).float()).square().mean(), {}


def train(engine: Engine, first: int, count: int) -> list[StepResult]:
    dtype = next(engine.module.parameters()).dtype
    results = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        batches = [torch.randn(3, HIDDEN, generator=generator).to(dtype) for _ in range(2)]
        results.append(engine.step(forward, batches))
    return results


def everything(engine: Engine) -> dict[str, Tensor]:
    """Weights, EMA and every tensor and number of the optimizer, by name."""
    found = {f"model.{n}": p.detach().clone() for n, p in engine.module.named_parameters()}
    found |= {f"ema.{n}": w.clone() for n, w in (engine.ema.weights if engine.ema else {}).items()}
    for piece in engine._optimizer.pieces:
        found[f"master.{piece.name}"] = piece.master.detach().clone()
        for key, value in piece.moments.items():
            found[f"{key}.{piece.name}"] = torch.as_tensor(value).clone()
    return found | {"steps": torch.tensor([engine.steps_done, engine.updates_done])}
