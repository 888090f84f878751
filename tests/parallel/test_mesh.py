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
        ValueError, match=r"tp = 1, pp = 1 is running .* tp = 2, pp = 1 was asked for. Call .*stop"
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


def test_pipeline_parallelism_is_refused_until_it_exists() -> None:
    with pytest.raises(ValueError, match=r"parallel.pp = 2, but pipeline parallelism is not available yet"):
        mesh_module._check_layout(ParallelConfig(pp=2), world_size=2)


def test_what_ranks_say_to_each_other_is_plain_in_one_process(mesh: Mesh) -> None:
    mesh.barrier()
    assert mesh.broadcast_object({"a": 1}) == {"a": 1}
    assert mesh.gather_objects("x") == ["x"]
    assert mesh.any_rank(True) and not mesh.any_rank(False)
    assert torch.equal(mesh.mean_over_dp(torch.arange(3.0)), torch.arange(3.0))


def test_a_process_that_left_torchrun_is_told_so_instead_of_waiting_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mesh_module, "_current", None)
    monkeypatch.setattr(mesh_module, "_left_torchrun", True)
    with pytest.raises(ValueError, match="cannot join again. Launch the ranks again"):
        start(ParallelConfig())
