"""`iomm bench fp8`: what the numerics of FP8 cost a training run.

Trains the configuration without FP8 and with each recipe, from the same weights on the same samples, one step
of each in turn. With the local layers FP8 is emulated: the losses are those of FP8, the times those of the
emulation.
"""

import dataclasses
import json
import statistics
import time

import torch

from iomm.config import Config
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader, global_batch_indices
from iomm.encoders import Encoders
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh, start
from iomm.system import build
from iomm.training.step import Dealt, StepInputs

RECIPES = ("none", "delayed", "current", "blockwise")
WINDOW_STEPS = 20  # the last steps, whose mean loss is compared


def bench_fp8(config: Config) -> str:
    """Loss and step time of `config` with every recipe, as a table and a line of JSON.

    Raises:
        ValueError: settings or shards that do not fit, or a layout of several ranks.
    """
    mesh = start(config.parallel)
    if mesh.world_size > 1:
        raise ValueError(f"iomm bench fp8 runs on one rank, not {mesh.world_size}. Run it without torchrun.")
    encoders = Encoders(config, mesh.device)
    runs = {recipe: _Run(config, recipe, encoders, mesh) for recipe in RECIPES}
    train = config.train
    loader = Loader.of_run(config, on_bad=_refuse, token_px=encoders.shapes.token_px)
    for step in range(train.steps):
        indices = global_batch_indices(step, train.global_batch_images, train.micro_batch_images, 0, 1)
        sizes_px = [loader.size_px(samples[0]) for samples in indices]
        dealt = Dealt(indices, sizes_px, dict(enumerate(loader.stream(indices))))
        for run in runs.values():
            run.step(dealt)
    plain = runs["none"]
    window = min(WINDOW_STEPS, train.steps)
    loss = {name: statistics.fmean(run.losses[-window:]) for name, run in runs.items()}
    change = {name: value / loss["none"] - 1 for name, value in loss.items()}
    ratio = {name: run.median_s / plain.median_s for name, run in runs.items()}
    record = {
        "bench": "fp8",
        "layers": plain.layers,
        "steps": train.steps,
        "window_steps": window,
        "loss": loss,
        "loss_change": change,
        "step_ms": {name: 1000 * run.median_s for name, run in runs.items()},
        "time_ratio": ratio,
    }
    lines = [f"{'fp8.recipe':12}{'loss':>10}{'change':>10}{'ms a step':>12}{'ratio':>8}"]
    lines += [
        f"{name:12}{loss[name]:10.5f}{change[name]:+10.2%}{1000 * run.median_s:12.1f}{ratio[name]:7.2f}x"
        for name, run in runs.items()
    ]
    lines.append(f"{train.steps} steps, loss of the last {window}; {plain.layers} layers")
    return "\n".join((*lines, json.dumps(record), ""))


class _Run:
    """One recipe's weights and what became of them."""

    def __init__(self, config: Config, recipe: str, encoders: Encoders, mesh: Mesh) -> None:
        fp8 = dataclasses.replace(config.fp8, recipe=recipe)  # type: ignore[arg-type]
        config = dataclasses.replace(config, fp8=fp8)
        system = build(config, encoders.shapes, mesh, encoders)
        self.layers = system.backend_config.transformer_impl
        self._engine = Engine(
            system, system.backend_config, config.optimizer, config.train, config.parallel, mesh
        )
        self._inputs = StepInputs(system, encoders, mesh)
        self.losses: list[float] = []
        self._seconds: list[float] = []

    @property
    def median_s(self) -> float:
        """Of a training step, without the encoders."""
        return statistics.median(self._seconds)

    def step(self, dealt: Dealt) -> None:
        """One training step."""
        items = self._inputs.encode(dealt)
        began = time.perf_counter()
        result = self._engine.step(self._inputs.forward, items, lambda: self._inputs.conditions(items))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - began)
        self.losses.append(result.loss)


def _refuse(bad: BadSampleReport) -> None:
    raise ValueError(f"unreadable sample: {bad}. Choose other shards for the benchmark.")
