"""Run by torchrun on two ranks: an imported checkpoint fills a tensor-parallel model, slice by slice."""

import sys
from pathlib import Path

import torch

from iomm.checkpoint import sharded
from iomm.checkpoint.hf_layout import GENERATOR_PREFIX
from iomm.checkpoint.hf_run import RunWeights
from iomm.config import ParallelConfig
from iomm.encoders import Encoders
from iomm.parallel.mesh import start
from iomm.system import System

weights = RunWeights(Path(sys.argv[1]), ema=False)
mesh = start(ParallelConfig(tp=2))
system = System(weights.config, Encoders(weights.config, mesh.device).shapes, mesh)
sharded.load_weights(weights.checkpoint, system, ema=False, mesh=mesh)
split = 0
for name, parameter in system.named_parameters():
    whole = weights.get(name)
    if name.startswith(GENERATOR_PREFIX):
        own = name.removeprefix(GENERATOR_PREFIX)
        split += weights.table.partition_dim(own) is not None
        whole = weights.table.slice(own, whole, mesh.tp_rank, 2)
    assert torch.equal(parameter.detach(), whole), name
assert split > 10
