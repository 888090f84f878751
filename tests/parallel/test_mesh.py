"""Ranks and their layout, in one process."""

import os

import pytest
import torch

from iomm.config import ParallelConfig
from iomm.parallel import mesh as mesh_module
from iomm.parallel.mesh import Mesh, start


def test_one_process_is_the_only_rank_and_opens_no_rendezvous_port(mesh: Mesh) -> None:
    assert (mesh.rank, mesh.world_size, mesh.dp_size, mesh.tp_size) == (0, 1, 1, 1)
    assert "MASTER_PORT" not in os.environ
    assert mesh.groups.tp.size() == mesh.groups.dp.size() == 1


def test_starting_twice_returns_the_same_mesh(mesh: Mesh) -> None:
    assert start(ParallelConfig()) is mesh


def test_starting_another_layout_names_both_and_the_way_out(mesh: Mesh) -> None:
    with pytest.raises(
        ValueError,
        match=r"tp = 1, pp = 1, virtual_stages = 1 is running .* tp = 2, pp = 1, .* was asked for. Call",
    ):
        start(ParallelConfig(tp=2))


def test_a_world_that_the_layout_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"world size 6 is not divisible by tp\*pp = 4\*1 = 4. Lower parallel.tp"
    ):
        mesh_module._check_layout(ParallelConfig(tp=4), world_size=6)


@pytest.mark.parametrize("tp", [0, -1])
def test_a_layout_below_one_rank_is_refused(tp: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        mesh_module._check_layout(ParallelConfig(tp=tp), world_size=4)


def test_one_process_is_first_and_last_stage_and_a_model_parallel_group_of_one(mesh: Mesh) -> None:
    assert (mesh.pp_rank, mesh.pp_size, mesh.virtual_stages) == (0, 1, 1)
    assert mesh.is_first_stage and mesh.is_last_stage
    assert (mesh.mp_rank, mesh.mp_size) == (0, 1)
    assert mesh.alone.tp.size() == mesh.alone.dp.size() == 1


def test_what_ranks_say_to_each_other_is_plain_in_one_process(mesh: Mesh) -> None:
    mesh.barrier()
    assert mesh.broadcast_object({"a": 1}) == {"a": 1}
    assert mesh.gather_objects("x") == ["x"]
    assert mesh.any_rank(True) and not mesh.any_rank(False)
    assert mesh.object_from_stage("x", 0) == "x"
    assert torch.equal(mesh.mean_over_dp(torch.arange(3.0)), torch.arange(3.0))
