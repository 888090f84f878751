"""`iomm bench encoders`: what the frozen encoders cost a step where `parallel.encoders` puts them.

Measured on the ranks that torchrun started, in the layout of the configuration: autoencoder, ViT, adapter,
MLLM and connector of all micro-batches of a step, forward and backward, with the messages between ranks, and
nothing of the generator. With `first_stage` one pipeline stage does it all (every one of its tensor-parallel
ranks the same); `shared` deals the micro-batches to all tp * pp ranks.
"""

import dataclasses
import json
import statistics
import time
from typing import Literal

import torch

from iomm.config import Config
from iomm.data.errors import BadSampleReport
from iomm.data.loader import Loader, global_batch_indices
from iomm.encoders import Encoders
from iomm.parallel.mesh import Mesh, start
from iomm.system import build
from iomm.training.step import Dealt, StepInputs

MODES: tuple[Literal["first_stage", "shared"], ...] = ("first_stage", "shared")


def bench_encoders(config: Config, repeats: int) -> str | None:
    """Time of one step's encoders in both modes, as a table and a line of JSON; on rank 0.

    Raises:
        ValueError: settings or shards that do not fit, or no repeats.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats: at least 1 is needed.")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=None))
    mesh = start(config.parallel)
    encoders = Encoders(config, mesh.device)
    train = config.train
    sizes = (train.global_batch_images, train.micro_batch_images, mesh.dp_rank, mesh.dp_size)
    indices = global_batch_indices(0, *sizes)
    loader = Loader.of_run(config, on_bad=_refuse, token_px=encoders.shapes.token_px)
    batches = dict(enumerate(loader.stream(indices)))
    sizes_px = [batch.size_px for batch in batches.values()]
    works = {}
    for mode in MODES:
        parallel = dataclasses.replace(config.parallel, encoders=mode)
        system = build(dataclasses.replace(config, parallel=parallel), encoders.shapes, mesh, encoders)
        inputs = StepInputs(system, encoders, mesh)
        own = {number: batch for number, batch in batches.items() if inputs.encodes(number)}
        works[mode] = inputs, Dealt(indices, sizes_px, own)
        _step(*works[mode])  # warm up
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(repeats):  # taken in turn, so that a slow moment of the machine meets both
        for mode, work in works.items():
            seconds[mode].append(_measure(mesh, *work))
    if mesh.rank != 0:
        return None
    median_ms = {mode: 1000 * statistics.median(values) for mode, values in seconds.items()}
    record = {
        "bench": "encoders",
        "world_size": mesh.world_size,
        "tp": mesh.tp_size,
        "pp": mesh.pp_size,
        "micro_batches": len(indices),
        "micro_batch_images": train.micro_batch_images,
        "step_ms": median_ms,
        "ratio": median_ms["first_stage"] / median_ms["shared"],
    }
    lines = [
        f"{'encoders':14}{'ms a step':>12}   ({len(indices)} micro-batches of {train.micro_batch_images})"
    ]
    lines += [f"{mode:14}{value:12.1f}" for mode, value in median_ms.items()]
    lines.append(
        f"shared is {record['ratio']:.2f}x faster on the {mesh.mp_size} ranks of a model-parallel group"
    )
    return "\n".join((*lines, json.dumps(record), ""))


def _refuse(bad: BadSampleReport) -> None:
    raise ValueError(f"unreadable sample: {bad}. Choose other shards for the benchmark.")


def _step(inputs: StepInputs, dealt: Dealt) -> None:
    """All that the encoders do in one step, with gradients of ones in place of the generator's."""
    items = inputs.encode(dealt)
    backward = inputs.conditions(items)
    for item in items:
        if item.condition_BTE is not None:
            item.condition_BTE.grad = torch.ones_like(item.condition_BTE)
        elif item.prefix is not None and inputs.encoders is not None:
            condition_BTE, _ = inputs.system.condition(inputs.encoders.mllm, item.prefix)
            condition_BTE.backward(torch.ones_like(condition_BTE))
    backward()


def _measure(mesh: Mesh, inputs: StepInputs, dealt: Dealt) -> float:
    """Seconds until the last rank is done."""
    mesh.barrier()
    began = time.perf_counter()
    _step(inputs, dealt)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    mesh.barrier()
    return time.perf_counter() - began
