"""Forward passes through a pipeline outside the training schedule: evaluation and sampling while a run
trains.

Stage 0 conducts: it decides what is computed, and every pass is announced to the other stages of its
pipeline, which serve until they are dismissed. So evaluation code runs on stage 0 as if the model were whole,
and the other stages need neither encoders nor evaluation data.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from iomm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Pass:
    """What every stage has to know of one forward pass."""

    grid: tuple[int, int]  # rows and columns of the latent tokens
    condition_tokens: int
    attend_BT: Tensor | None  # True where a condition token counts; None: all do


@final
class Relay:
    """Messages between the stages of one pipeline. Every rank of the pipeline has one.

    Args:
        mesh: where this rank stands.
        dtype: of the tensors that are carried.
    """

    def __init__(self, mesh: Mesh, dtype: torch.dtype) -> None:
        self.mesh, self.dtype = mesh, dtype

    def announce(self, what: Pass | None) -> None:
        """On stage 0: tell the other stages of the next pass; None dismisses them."""
        attend = None if what is None else what.attend_BT
        rows = 0 if attend is None else attend.shape[0]
        header = [0] * 5 if what is None else [1, *what.grid, what.condition_tokens, rows]
        dist.broadcast(torch.tensor(header, device=self.mesh.device), group=self.mesh.groups.pp, group_src=0)
        if attend is not None:
            dist.broadcast(attend.to(self.mesh.device, torch.uint8), group=self.mesh.groups.pp, group_src=0)

    def await_pass(self) -> Pass | None:
        """On the other stages: what `announce` said."""
        header = torch.zeros(5, dtype=torch.int64, device=self.mesh.device)
        dist.broadcast(header, group=self.mesh.groups.pp, group_src=0)
        go, *grid, tokens, rows = header.tolist()
        if not go:
            return None
        attend = None
        if rows:
            attend = torch.empty(rows, tokens, dtype=torch.uint8, device=self.mesh.device)
            dist.broadcast(attend, group=self.mesh.groups.pp, group_src=0)
            attend = attend.bool()
        return Pass((grid[0], grid[1]), tokens, attend)

    def send(self, tensor: Tensor, stage: int) -> None:
        """A tensor of three dimensions, to another stage."""
        shape = torch.tensor(tensor.shape, device=self.mesh.device)
        dist.send(shape, group=self.mesh.groups.pp, group_dst=stage)
        dist.send(tensor.to(self.dtype).contiguous(), group=self.mesh.groups.pp, group_dst=stage)

    def receive(self, stage: int) -> Tensor:
        """What another stage sent."""
        shape = torch.zeros(3, dtype=torch.int64, device=self.mesh.device)
        dist.recv(shape, group=self.mesh.groups.pp, group_src=stage)
        tensor = torch.empty(shape.tolist(), dtype=self.dtype, device=self.mesh.device)
        dist.recv(tensor, group=self.mesh.groups.pp, group_src=stage)
        return tensor
