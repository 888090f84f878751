"""The schedule in one process; stages are in test_layouts.py."""

import dataclasses

import pytest
import torch
from torch import nn

from iomm.config import ParallelConfig
from iomm.parallel.backend import transformer_config
from iomm.parallel.mesh import Mesh
from iomm.parallel.pipeline import Pipeline


def pipeline(mesh: Mesh, chunks: int = 1) -> Pipeline:
    config = transformer_config(4, 1, torch.float64, mesh, ParallelConfig())
    return Pipeline([nn.Linear(4, 4, dtype=torch.float64) for _ in range(chunks)], config, mesh)


def test_a_rank_with_another_number_of_chunks_than_virtual_stages_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="has 2 chunks, parallel.virtual_stages is 1"):
        pipeline(mesh, chunks=2)


def test_micro_batches_that_the_interleaved_schedule_cannot_take_are_refused_with_the_way_out(
    mesh: Mesh,
) -> None:
    made = pipeline(mesh)
    made.mesh = dataclasses.replace(mesh, pp_size=2, virtual_stages=2)
    with pytest.raises(
        ValueError, match=r"3 micro-batches .* not a multiple of parallel.pp 2.*train.micro_b"
    ):
        made.run(lambda *_: (torch.zeros(()), {}), [0, 1, 2])
