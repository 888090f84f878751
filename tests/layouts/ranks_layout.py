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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import iomm.conditioning.mask
import iomm.encoders
import iomm.flow.timesteps
import iomm.random
import iomm.system
from iomm.checkpoint.folder import name_of
from iomm.conditioning import prompts
from iomm.parallel import mesh as mesh_module
from iomm.random import Stream
from iomm.training.step import StepInputs
from iomm.training.train import train
from tests.layouts.cases import EVERY, SAVE_EVERY, Run


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

    def keep(stream: str, index_B: Tensor, values: Tensor) -> None:
        for index, row in zip(index_B.tolist(), values, strict=True):
            found = record["draws"].setdefault(f"{stream} {index}", digest(row))
            assert found == digest(row), f"{stream} of sample {index} changed between two draws"

    def uniform(seed: int, stream: Stream, index_B: Tensor, n: int) -> Tensor:
        values = iomm.random.uniform(seed, stream, index_B, n)
        if stream in (Stream.TIMESTEP, Stream.NULL):
            keep(stream.name, index_B, values)
        return values

    # The operators draw inside: noise shows as the target z - x of x = 0, the mask as what is left of ones.
    def flow_noise(x_BLC: Tensor, t_B: Tensor, index_B: Tensor, *more: Any, **provider: Any) -> Any:
        _, z_BLC = noise_operator(torch.zeros_like(x_BLC), t_B, index_B, *more, **provider)
        keep("NOISE", index_B, z_BLC)
        return noise_operator(x_BLC, t_B, index_B, *more, **provider)

    def mask_tokens(x_BNF: Tensor, index_B: Tensor, *draw: Any) -> Tensor:
        keep("MASK", index_B, mask_operator(torch.ones_like(x_BNF[..., :1]), index_B, *draw) == 1)
        return mask_operator(x_BNF, index_B, *draw)

    def keep_tokens(index_B: Tensor, *draw: Any) -> Tensor:
        keep_BN = keep_operator(index_B, *draw)
        keep("MASK", index_B, keep_BN[..., None])
        return keep_BN

    noise_operator = iomm.system.flow_noise
    mask_operator, keep_operator = prompts.mask_tokens, prompts.keep_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepInputs, "encode", remember_order)
        for module in (iomm.flow.timesteps, iomm.conditioning.mask):
            patch.setattr(module, "uniform", uniform)
        patch.setattr(iomm.system, "flow_noise", flow_noise)
        patch.setattr(prompts, "mask_tokens", mask_tokens)
        patch.setattr(prompts, "keep_tokens", keep_tokens)
        yield record


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
