"""How long a training step is held up by a checkpoint: written while it waits, and beside it.

    python tools/measure_save.py --params 5e7 [--folder SCRATCH]
    torchrun --nproc-per-node 2 tools/measure_save.py --params 5e7

Trains linear layers of width 1024 in fp32 with AdamW and EMA, 16 bytes of checkpoint a parameter, and saves
twice each way, in turn. Everything it wrote is removed again. Prints a table and a line of JSON.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iomm import presets
from iomm.checkpoint.saver import Saver
from iomm.config import Config
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.engine import Engine
from iomm.parallel.mesh import Mesh, start, stop

WIDTH, ROWS = 1024, 256


def make(config: Config, layers: int, mesh: Mesh) -> Engine:
    transformer = transformer_config(WIDTH, 8, torch.float32, mesh, config.parallel)
    make_layer = Layers(transformer, mesh).column
    module = nn.Sequential(*(make_layer(WIDTH, WIDTH) for _ in range(layers)))
    for weight in module.parameters():
        nn.init.normal_(weight, std=WIDTH**-0.5) if weight.ndim > 1 else nn.init.zeros_(weight)
    return Engine(module, transformer, config.optimizer, config.train, config.parallel, mesh)


def forward(module: nn.Module, _: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return module(x_BD).square().mean(), {}


class Measured:
    """Seconds of steps and of what saving does between them."""

    def __init__(self, engine: Engine, folder: Path, config: Config, mesh: Mesh) -> None:
        self.engine, self.config, self.mesh = engine, config, mesh
        self.savers = {b: Saver(folder / str(b), 1, mesh, background=b) for b in (False, True)}
        self.x_BD = torch.randn(ROWS, WIDTH, device=mesh.device)

    def timed(self, action: Any) -> tuple[float, Any]:
        self._wait()
        before = time.perf_counter()
        result = action()
        self._wait()
        return time.perf_counter() - before, result

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        self.mesh.barrier()

    def step(self) -> float:
        return self.timed(lambda: self.engine.step(forward, [self.x_BD]))[0]

    def save(self, *, background: bool) -> dict[str, float]:
        """Held up by `save`, and by `poll` when it completes the checkpoint; steps meanwhile."""
        saver = self.savers[background]
        step = self.engine.steps_done
        held, path = self.timed(lambda: saver.save(step, self.engine, self.config, {}))
        steps, completing, began = [], 0.0, time.perf_counter()
        while path is None:
            steps.append(self.step())
            completing, path = self.timed(saver.poll)
        return {
            "held_up_s": held,
            "completing_s": completing,
            "steps_meanwhile": len(steps),
            "step_meanwhile_s": statistics.median(steps) if steps else 0.0,
            "written_after_s": held + (time.perf_counter() - began if steps else 0.0),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a training step is held up by a checkpoint.")
    parser.add_argument("--params", type=float, default=5e7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; default: a temporary folder"
    )
    arguments = parser.parse_args()
    config = presets.tiny("measured", Path("examples"), steps=1000)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, wandb="disabled"))
    mesh = start(config.parallel)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(mesh.broadcast_object(scratch))
        measured = Measured(make(config, round(arguments.params / WIDTH**2), mesh), folder, config, mesh)
        plain = [measured.step() for _ in range(5)]
        results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(arguments.repeats):  # in turn, so that a slow moment of the machine meets both
            for background, found in results.items():
                found.append(measured.save(background=background))
        mesh.barrier()
    if mesh.rank == 0:
        sys.stdout.write(report(arguments.params, statistics.median(plain[1:]), results, mesh))
    stop()


def report(params: float, plain_s: float, results: dict[bool, list[dict[str, float]]], mesh: Mesh) -> str:
    """Medians over the repeats."""
    medians = {
        "background" if background else "waiting": {
            key: statistics.median(entry[key] for entry in found) for key in found[0]
        }
        for background, found in results.items()
    }
    columns = list(next(iter(medians.values())))
    lines = [
        f"{params:,.0f} parameters, {16 * params / 2**30:.2f} GiB a checkpoint, {mesh.world_size} ranks, "
        f"{mesh.device.type}, {os.cpu_count()} cores; a step without saving {plain_s:.3f} s",
        f"{'':12}" + "".join(f"{name:>18}" for name in columns),
    ]
    lines += [f"{way:12}" + "".join(f"{row[c]:18.3f}" for c in columns) for way, row in medians.items()]
    record = {"params": params, "ranks": mesh.world_size, "step_s": plain_s, **medians}
    return "\n".join((*lines, json.dumps(record), ""))


if __name__ == "__main__":
    main()
