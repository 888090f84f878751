"""Ranks that are not there: a mesh that says what a rank of any layout would hear, for modules on the meta
device, which send nothing."""

import dataclasses
from types import SimpleNamespace
from typing import Any

from iomm.config import ParallelConfig
from iomm.parallel.mesh import Mesh, start


@dataclasses.dataclass(frozen=True)
class Group:
    """A process group as far as layers ask."""

    members: int

    def size(self) -> int:
        return self.members

    def rank(self) -> int:
        return 0


def mesh_of(parallel: ParallelConfig, pp_rank: int, replicas: int = 1) -> Mesh:
    """The mesh that the first rank of pipeline stage `pp_rank` would see."""
    groups: Any = SimpleNamespace(tp=Group(parallel.tp), pp=Group(parallel.pp), dp=Group(replicas))
    return dataclasses.replace(
        start(ParallelConfig()),
        world_size=parallel.tp * parallel.pp * replicas,
        dp_size=replicas,
        tp_size=parallel.tp,
        pp_rank=pp_rank,
        pp_size=parallel.pp,
        virtual_stages=parallel.virtual_stages,
        groups=groups,
    )
