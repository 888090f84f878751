"""Run on 2 ranks: training with data parallelism 2, saving, resuming, and a bad step on one rank.

Prints one line of JSON from rank 0; `train` is also called by the test in its own process, for comparison.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from iomm.checkpoint.sharded import load, save
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
from iomm.parallel import mesh as mesh_module
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.engine import DTYPES, Engine
from iomm.parallel.masters import state_tensors
from iomm.parallel.mesh import Mesh

HIDDEN, GLOBAL_BATCH = 8, 8


def settings(precision: str, distributed: bool) -> Config:
    return Config(
        name="ranks",
        generator=GeneratorConfig(
            hidden_size=HIDDEN, heads=1, double_blocks=1, rope_axes=(2, 2, 4), condition_width=8
        ),
        mllm=MllmConfig(path="mllm"),
        codec=CodecConfig(path="vae"),
        data=DataConfig(images=("*.tar",)),
        train=TrainConfig(
            steps=8,
            global_batch_images=GLOBAL_BATCH,
            micro_batch_images=2,
            precision=precision,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, ema_decay=0.9, weight_decay=0.01),
        parallel=ParallelConfig(distributed_optimizer=distributed),
    )


def engine(config: Config, mesh: Mesh, seed: int = 0) -> Engine:
    transformer = transformer_config(HIDDEN, 1, DTYPES[config.train.precision], mesh, config.parallel)
    layers = Layers(transformer, mesh)
    module = nn.Sequential(layers.column(HIDDEN, 33), nn.Tanh(), layers.row(33, HIDDEN))
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return Engine(module, transformer, config.optimizer, config.train, config.parallel, mesh)


def forward(module: nn.Module, _: Tensor | None, x_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (module(x_BD) - x_BD.flip(-1)).square().mean()
    return loss, {"double": 2 * loss}


def batches(config: Config, mesh: Mesh, step: int) -> list[Tensor]:
    """This rank's micro-batches of the global batch, which is a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    x_GD = torch.randn(GLOBAL_BATCH, HIDDEN, generator=generator).to(DTYPES[config.train.precision])
    return list(x_GD.chunk(mesh.dp_size)[mesh.dp_rank].split(config.train.micro_batch_images))


def train(made: Engine, config: Config, mesh: Mesh, first: int, count: int) -> list[list[float]]:
    """(loss, gradient norm, metric) of each step."""
    out = []
    for step in range(first, first + count):
        mine = batches(config, mesh, step)
        result = made.step(forward, mine)
        out.append([result.loss, result.grad_norm, result.metrics["double"]])
    return out


def state(made: Engine) -> list[Tensor]:
    assert made.ema is not None
    moments = [t for tensors in state_tensors(made._optimizer.pieces).values() for t in tensors.values()]
    return [t.detach().clone() for t in (*made.module.parameters(), *made.ema.weights.values(), *moments)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check_resume(config: Config, mesh: Mesh, folder: Path) -> list[list[float]]:
    straight = engine(config, mesh)
    losses = train(straight, config, mesh, 0, 2)
    path = save(folder, 2, straight, config, {"position": 16}, keep_last=1, mesh=mesh)
    losses += train(straight, config, mesh, 2, 2)
    resumed = engine(config, mesh, seed=1)
    assert load(path, resumed, config, mesh).extra == {"position": 16}
    assert train(resumed, config, mesh, 2, 2) == losses[2:]
    assert same(state(resumed), state(straight))
    return losses


def check_bad_step(config: Config, mesh: Mesh) -> None:
    """NaN in one micro-batch of the last rank: both ranks skip and keep everything."""
    made = engine(config, mesh)
    train(made, config, mesh, 0, 1)
    before, mine = state(made), batches(config, mesh, 1)
    if mesh.rank == mesh.world_size - 1:
        mine[0] = mine[0] * math.nan
    assert made.step(forward, mine).skipped
    assert same(before, state(made))
    assert not made.step(forward, batches(config, mesh, 2)).skipped


def main() -> None:
    mesh = mesh_module.start(ParallelConfig())
    assert (mesh.dp_size, mesh.tp_size, mesh.dp_rank) == (2, 1, mesh.rank)
    folder, losses = Path(sys.argv[1]), {}
    for precision, distributed in (("fp32", True), ("fp32", False), ("fp64", False)):
        name = f"{precision} {distributed}"
        losses[name] = check_resume(settings(precision, distributed), mesh, folder / name.replace(" ", "_"))
    check_bad_step(settings("fp32", True), mesh)
    mean = mesh.mean_over_dp(torch.tensor([float(mesh.rank)]))
    assert mean.item() == 0.5
    if mesh.rank == 0:
        sys.stdout.write(f"LOSSES {json.dumps(losses)}\n")
    mesh.barrier()
    mesh_module.stop()


if __name__ == "__main__":
    main()
