"""Who is slow, and in what."""

from iomm.parallel.mesh import Mesh
from iomm.training.stragglers import Straggler, compare, find_straggler, own_work

EVEN = {"batch": 0.1, "encode": 0.3, "step": 2.0, "gradient_sum": 0.5, "save": 9.0}  # seconds of 10 steps
HOSTS = ["n1", "n1", "n2", "n2"]


def slow(**changes: float) -> dict[str, float]:
    return EVEN | changes


def test_own_work_leaves_out_the_wait_for_others_and_what_only_one_rank_does():
    assert own_work(EVEN) == {"batch": 0.1, "encode": 0.3, "step": 1.5}
    assert own_work({}) == {"batch": 0.0, "encode": 0.0, "step": 0.0}


def test_the_slowest_rank_is_named_with_its_host_and_the_phase_in_which_it_loses():
    # All leave the step together: who computes longer waits less.
    found = find_straggler([EVEN, EVEN, slow(gradient_sum=0.1), EVEN], HOSTS, 10)
    assert found is None  # 230 ms against 190: a quarter more is slow
    found = find_straggler([EVEN, EVEN, slow(batch=1.4), EVEN], HOSTS, 10)
    assert found == Straggler(rank=2, host="n2", own_ms=320.0, median_ms=190.0, phase="batch")
    assert "rank 2 on n2 is slow: 320.0 ms of own work a step, the median rank 190.0 ms" in str(found)
    computing = find_straggler([slow(step=3.0, gradient_sum=0.0), EVEN, EVEN, EVEN], HOSTS, 10)
    assert computing is not None and (computing.rank, computing.phase) == (0, "step")


def test_of_two_ranks_the_slower_one_is_named():
    found = find_straggler([EVEN, slow(encode=3.0)], ["a", "b"], 10)
    assert found is not None and (found.rank, found.phase) == (1, "encode")


def test_milliseconds_of_noise_on_a_small_model_are_not_slowness():
    quick = {"batch": 0.0001, "step": 0.004}
    assert find_straggler([quick, quick | {"step": 0.006}], ["a", "b"], 1) is None


def test_the_record_has_every_phase_by_rank(mesh: Mesh):
    record, found = compare(mesh, EVEN, 10)
    assert record == {
        "steps": 10,
        "phases_ms": {
            "batch": [10.0],
            "encode": [30.0],
            "step": [200.0],
            "gradient_sum": [50.0],
            "save": [900.0],
        },
    }
    assert found is None
