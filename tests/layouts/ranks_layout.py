"""Run under torchrun, or in one process: training runs one after another, each in a layout of its own.

    ranks_layout.py WORLD OUT RUN...            RUN: names of `tests.layouts.cases.Run`s of as many ranks

Every rank writes OUT/FOLDER/draws_RANK.json: which samples it saw, in which order, and a digest of every
random number that was drawn for them.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import iomm.encoders
import iomm.random
from iomm.checkpoint.folder import name_of
from iomm.parallel import mesh as mesh_module
from iomm.random import Stream
from iomm.training.step import StepInputs
from iomm.training.train import train
from tests.layouts.cases import EVERY, SAVE_EVERY, Run

_DRAWS = (iomm.random.uniform, iomm.random.normal)
_STREAMS = (Stream.NOISE, Stream.TIMESTEP, Stream.MASK, Stream.NULL)


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Any]]:
    """Inside the block: {"order": steps of micro-batches of sample indices, "draws": digest by stream and
    sample}."""
    record: dict[str, Any] = {"order": [], "draws": {}}
    encode = StepInputs.encode

    def remember_order(self: StepInputs, dealt: Any) -> Any:
        record["order"].append([list(indices) for indices in dealt.indices])
        return encode(self, dealt)

    def remember(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(seed: int, stream: Stream, index_B: Tensor, n: int) -> Tensor:
            values = draw(seed, stream, index_B, n)
            if stream in _STREAMS:
                for index, row in zip(index_B.tolist(), values, strict=True):
                    found = record["draws"].setdefault(f"{stream.name} {index}", digest(row))
                    assert found == digest(row), f"{stream.name} of sample {index} changed between two draws"
            return values

        return drawn

    patched = [
        (module, name, value)
        for module in [m for n, m in list(sys.modules.items()) if n.startswith("iomm.")]
        for name, value in vars(module).items()
        if value in _DRAWS
    ]
    try:
        StepInputs.encode = remember_order  # type: ignore[method-assign]
        for module, name, value in patched:
            setattr(module, name, remember(value))
        yield record
    finally:
        StepInputs.encode = encode  # type: ignore[method-assign]
        for module, name, value in patched:
            setattr(module, name, value)


def do(run: Run, world: Path, out: Path) -> None:
    """One run, on all ranks."""
    config = run.config(world, out)
    mesh = mesh_module.start(config.parallel)
    if mesh.rank == 0:
        config.run_dir.mkdir(parents=True)
        if run.start is not None:
            origin = out / run.start.folder / "checkpoints" / name_of(SAVE_EVERY)
            shutil.copytree(origin, config.run_dir / "checkpoints" / origin.name)
    mesh.barrier()
    with recorded() as record:
        train(config)
    record["place"] = [mesh.dp_rank, mesh.dp_size]
    (config.run_dir / f"draws_{mesh.rank}.json").write_text(json.dumps(record))
    mesh.barrier()


def main() -> None:
    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    # The frozen models are the same in all runs, and opening them is a good part of a run's time.
    iomm.encoders.open_codec = functools.cache(iomm.encoders.open_codec)
    iomm.encoders.open_mllm = functools.cache(iomm.encoders.open_mllm)
    by_name = {run.name: run for run in EVERY}
    for name in sys.argv[3:]:
        do(by_name[name], world, out)
        mesh_module.stop()


if __name__ == "__main__":
    main()
