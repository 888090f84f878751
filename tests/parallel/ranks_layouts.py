"""Run on 2 or 4 ranks: one run handed from layout to layout, two steps each, by its state in names alone.

Every leg starts with other weights and loads the state of the leg before. The test compares losses, gradient
norms and the last state with a single process that did all the steps.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iomm.config import OptimizerConfig, OptimizerGroup, ParallelConfig, TrainConfig
from iomm.parallel import mesh as mesh_module
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.engine import DTYPES, Engine, StepResult
from iomm.parallel.mesh import Mesh

HIDDEN, BLOCKS, SAMPLES, MICRO_BATCH, STEPS_A_LEG = 8, 4, 4, 1, 2
LEGS = {
    2: [{}, dict(tp=2), dict(pp=2), dict(pp=2, virtual_stages=2), dict(pp=2, encoders="shared"),
        dict(tp=2, encoders="shared"), dict(encoders="shared")],
    4: [dict(tp=2, pp=2), dict(pp=2), dict(tp=2), dict(pp=4, encoders="shared"),
        dict(pp=2, virtual_stages=2, encoders="shared"), dict(tp=2, pp=2, virtual_stages=2)],
}  # fmt: skip
OPTIMIZERS = {
    "adamw": OptimizerConfig(
        lr=1e-2, warmup_steps=2, ema_decay=0.9, weight_decay=0.1, clip_norm=0.5,
        groups=(OptimizerGroup(match="conditioner.*", lr_scale=0.5, weight_decay=0.0),),
    ),
    "muon": OptimizerConfig(kind="muon", lr=1e-2, warmup_steps=2, ema_decay=0.9, weight_decay=0.1),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.qkv, self.down = layers.column(HIDDEN, 24), layers.row(24, HIDDEN)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return x_SBD + self.down(self.qkv(x_SBD).tanh())


class Chunk(nn.Module):
    """What one virtual stage registers."""

    def __init__(self, parts: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts, self.blocks = nn.ModuleDict(parts), nn.ModuleDict(blocks)


class Toy(nn.Module):
    """Conditioner, entry, blocks, exit, under names that do not depend on the layout."""

    def __init__(self, layers: Layers, parallel: ParallelConfig, mesh: Mesh) -> None:
        super().__init__()
        shares = parallel.encoders == "shared"
        if mesh.is_first_stage:
            self.entry = layers.replicated(HIDDEN, HIDDEN)
        if mesh.is_first_stage or shares:
            self.conditioner = nn.Linear(HIDDEN, HIDDEN, dtype=layers.config.params_dtype)
        if mesh.is_last_stage:
            self.exit = layers.replicated(HIDDEN, HIDDEN)
        ranges = torch.arange(BLOCKS).chunk(mesh.pp_size * mesh.virtual_stages)
        mine = [ranges[v * mesh.pp_size + mesh.pp_rank].tolist() for v in range(mesh.virtual_stages)]
        self.generator = nn.ModuleDict({str(n): Block(layers) for numbers in mine for n in numbers})
        self.chunks, self.shared = [], None
        for stage, numbers in enumerate(mine):
            parts: dict[str, nn.Module] = {}
            if mesh.is_first_stage and stage == 0:
                parts |= {"entry": self.entry} | ({} if shares else {"conditioner": self.conditioner})
            if mesh.is_last_stage and stage == mesh.virtual_stages - 1:
                parts["exit"] = self.exit
            self.chunks.append(Chunk(parts, {str(n): self.generator[str(n)] for n in numbers}))
        if shares:
            object.__setattr__(self, "shared", self.conditioner)
            for weight in self.conditioner.parameters():
                weight.shared_by_all = True  # type: ignore[attr-defined]


@dataclasses.dataclass
class Item:
    x_SBD: Tensor
    condition_BD: Tensor  # what the conditioner reads; with a shared one, what it made


def forward(chunk: Chunk, carried: Tensor | None, item: Item) -> tuple[Tensor, dict[str, Tensor]]:
    x_SBD = carried
    if "entry" in chunk.parts:
        condition = item.condition_BD
        if "conditioner" in chunk.parts:
            condition = chunk.parts["conditioner"](condition)
        x_SBD = chunk.parts["entry"](item.x_SBD) + condition
    assert x_SBD is not None
    for block in chunk.blocks.values():
        x_SBD = block(x_SBD)
    if "exit" not in chunk.parts:
        return x_SBD, {}
    loss = (chunk.parts["exit"](x_SBD) - item.x_SBD.flip(-1)).square().mean()
    return loss, {"double": 2 * loss}


def items(step: int, dtype: torch.dtype) -> list[Item]:
    """A step's micro-batches. Their lengths differ."""
    generator = torch.Generator().manual_seed(step)
    out = []
    for sample in range(SAMPLES):
        shape = (2 + sample % 3, MICRO_BATCH, HIDDEN)
        x_SBD, c_BD = (torch.randn(s, generator=generator).to(dtype) for s in (shape, shape[1:]))
        out.append(Item(x_SBD, c_BD))
    return out


def conditions(toy: Toy, batch: list[Item], mesh: Mesh) -> Callable[[], None]:
    """Micro-batch m's condition is made by rank m mod M of the model-parallel group; all get it."""
    made: dict[int, Tensor] = {}
    for number, item in enumerate(batch):
        owner, value = number % mesh.mp_size, torch.empty_like(item.condition_BD)
        if owner == mesh.mp_rank:
            made[number] = toy.conditioner(item.condition_BD)
            value = made[number].detach().clone()
        dist.broadcast(value, group=mesh.groups.mp, group_src=owner)
        item.condition_BD = value.requires_grad_()

    def backward() -> None:
        for number, item in enumerate(batch):
            gradient = item.condition_BD.grad
            gradient = torch.empty_like(item.condition_BD) if gradient is None else gradient
            dist.broadcast(gradient, group=mesh.groups.mp, group_src=0)
            if number in made:
                made[number].backward(gradient)

    return backward


def engine(
    kind: str, precision: Any, distributed: bool, parallel: ParallelConfig, mesh: Mesh, seed: int
) -> Engine:
    dtype = DTYPES[precision]
    config = transformer_config(HIDDEN, 2, dtype, mesh, parallel)
    toy = Toy(Layers(config, mesh), parallel, mesh)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Any] = dict(toy.named_parameters())
    with torch.no_grad():
        for name, shape in whole_shapes().items():
            whole = torch.randn(shape, generator=generator) * 0.4
            if name in weights and getattr(weights[name], "tensor_model_parallel", False):
                whole = whole.chunk(mesh.tp_size, weights[name].partition_dim)[mesh.tp_rank]
            if name in weights:
                weights[name].copy_(whole)
    train = TrainConfig(
        steps=99, global_batch_images=SAMPLES, micro_batch_images=MICRO_BATCH, precision=precision
    )
    parallel = dataclasses.replace(parallel, distributed_optimizer=distributed)
    return Engine(toy, config, OPTIMIZERS[kind], train, parallel, mesh)


def whole_shapes() -> dict[str, tuple[int, ...]]:
    linears = {"conditioner": (HIDDEN, HIDDEN), "entry": (HIDDEN, HIDDEN), "exit": (HIDDEN, HIDDEN)}
    for n in range(BLOCKS):
        linears |= {f"generator.{n}.qkv": (24, HIDDEN), f"generator.{n}.down": (HIDDEN, 24)}
    return {f"{name}.weight": s for name, s in linears.items()} | {
        f"{n}.bias": s[:1] for n, s in linears.items()
    }


def train(made: Engine, first: int, count: int, mesh: Mesh) -> list[list[float]]:
    """(loss, gradient norm, metric) of each step."""
    out = []
    for number in range(first, first + count):
        result = step(made, items(number, dtype_of(made))[mesh.dp_rank :: mesh.dp_size], mesh)
        assert not result.skipped
        out.append([result.loss, result.grad_norm, result.metrics["double"]])
    return out


def step(made: Engine, batch: list[Item], mesh: Mesh) -> StepResult:
    toy: Any = made.module
    return made.step(forward, batch, toy.shared and (lambda: conditions(toy, batch, mesh)))


def dtype_of(made: Engine) -> torch.dtype:
    return next(made.module.parameters()).dtype


def _shards(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        for value in state:
            yield from _shards(value)
    elif not isinstance(state, int):
        yield state


def whole_state(made: Engine, mesh: Mesh) -> dict[str, Any]:
    """The state of all ranks put together by name; every element comes from exactly one main replica."""
    state = made.sharded_state()
    mine = [(s.key, s.global_shape, s.global_slice(), s.data.clone()) for s in _shards(state)
            if not any(s.replica_id)]  # fmt: skip
    whole: dict[str, Any] = {}
    written: dict[str, Tensor] = {}
    for key, shape, where, data in (entry for there in mesh.gather_objects(mine) for entry in there):
        whole.setdefault(key, torch.zeros(shape, dtype=data.dtype))[where] = data
        written.setdefault(key, torch.zeros(shape, dtype=torch.int))[where] += 1
    for key, count in written.items():
        assert (count == 1).all(), f"{key} is written {count.tolist()} times"
    return whole | {name: state[name] for name in ("steps_done", "updates_done")}


def load(made: Engine, whole: Mapping[str, Any]) -> None:
    state = made.sharded_state()

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(v) for key, v in value.items()}
        if isinstance(value, list):
            return [fill(v) for v in value]
        return whole[value.key][value.global_slice()]

    counts = {name: whole[name] for name in ("steps_done", "updates_done")}
    made.load_sharded_state(fill({k: v for k, v in state.items() if k not in counts}) | counts)


def race(cases: list[str], legs: list[dict[str, Any]]) -> dict[str, Any]:
    """Hand the run of every case from layout to layout: (numbers of all steps, last state) by case."""
    numbers: dict[str, list[list[float]]] = {case: [] for case in cases}
    states: dict[str, Any] = {}
    for leg, layout in enumerate(legs):
        mesh_module.stop()
        parallel = ParallelConfig(**layout)
        mesh = mesh_module.start(parallel)
        for case in cases:
            kind, precision, distributed = case.split("-")
            made = engine(kind, precision, distributed == "sharded", parallel, mesh, seed=leg)
            if case in states:
                load(made, states[case])
            numbers[case] += train(made, leg * STEPS_A_LEG, STEPS_A_LEG, mesh)
            check_average(made)
            check_bad_step(made, mesh)
            states[case] = whole_state(made, mesh)
    return {case: {"numbers": numbers[case], "state": states[case]} for case in cases}


def check_bad_step(made: Engine, mesh: Mesh) -> None:
    """NaN in one micro-batch of one data-parallel rank: every rank skips the step and keeps everything."""
    before = [s.data.clone() for s in _shards(made.sharded_state())]
    batch = items(0, dtype_of(made))[mesh.dp_rank :: mesh.dp_size]
    if mesh.dp_rank == mesh.dp_size - 1:
        batch[1].x_SBD.mul_(math.nan)
    assert step(made, batch, mesh).skipped
    for kept, now in zip(before, _shards(made.sharded_state()), strict=True):
        assert torch.equal(kept, now.data), now.key
    made.steps_done -= 1  # the run goes on as if this step had not been


def check_average(made: Engine) -> None:
    """Swapped in, the layers' weights are the average; afterwards they are what they were, bit for bit."""
    assert made.ema is not None
    own = [p.detach().clone() for p in made.module.parameters()]
    with made.ema.swapped_in():
        for piece in made._optimizer.pieces:
            assert torch.equal(piece.of_weight(), made.ema.weights[piece.name].to(piece.weight.dtype))
        assert not all(torch.equal(a, b) for a, b in zip(own, made.module.parameters(), strict=True))
    for (name, now), before in zip(made.module.named_parameters(), own, strict=True):
        assert torch.equal(before, now), name


def main() -> None:
    legs = LEGS[int(os.environ["WORLD_SIZE"])]
    out = race(sys.argv[2:], legs)
    mesh = mesh_module.start(ParallelConfig(**legs[-1]))
    if mesh.rank == 0:
        torch.save(out, Path(sys.argv[1]))
    mesh.barrier()
    mesh_module.stop()


if __name__ == "__main__":
    main()
