"""Step estimates: what must hold whatever the efficiencies are."""

import pytest

from iomm.config import ParallelConfig
from iomm.plan.calibration import Efficiency
from iomm.plan.communication import bus, ring
from iomm.plan.hardware import Cluster, find_gpu
from iomm.plan.step import estimate
from iomm.plan.weights import Weight, newton_schulz_flops
from iomm.plan.workload import Workload, varied
from tests.plan.small_plans import cluster, small_work

EFFICIENCY = Efficiency()


def part(work: Workload, name: str, gpus: int = 8) -> float:
    return next(s for n, s in estimate(work, cluster(gpus), EFFICIENCY).parts.items() if n.startswith(name))


def test_the_parts_add_up_to_the_rate():
    made = estimate(small_work(), cluster(8), EFFICIENCY)
    assert made.seconds == pytest.approx(sum(made.parts.values()))
    assert made.images_per_s * made.seconds * 8 == pytest.approx(64)
    assert 0 < made.mfu < 1


def test_a_better_system_factor_shortens_everything_but_the_waiting():
    slow, fast = (estimate(small_work(), cluster(8), Efficiency(system=f)) for f in (0.5, 1.0))
    for name in slow.parts:
        if name != "communication waited for":
            assert slow.parts[name] == pytest.approx(2 * fast.parts[name])


def test_one_gpu_waits_for_nobody():
    made = estimate(small_work(), cluster(1), EFFICIENCY)
    assert made.transfers == [] and made.parts["communication waited for"] == 0


def test_interleaving_shrinks_the_bubble():
    plain = small_work(parallel=ParallelConfig(pp=2))
    assert part(varied(plain, parallel__virtual_stages=2), "pipeline bubble") < part(plain, "pipeline bubble")
    assert part(small_work(), "pipeline bubble") == 0


def test_shared_encoders_split_their_time_over_the_model_parallel_ranks():
    alone = small_work(parallel=ParallelConfig(tp=2))
    shared = varied(alone, parallel__encoders="shared")
    assert part(shared, "frozen encoders") == pytest.approx(part(alone, "frozen encoders") / 2)


def test_tensor_parallel_ranks_do_half_the_generator_with_sequence_parallelism():
    whole = small_work(parallel=ParallelConfig())
    split = small_work(parallel=ParallelConfig(tp=2, sequence_parallel=True))
    one = part(whole, "generator", gpus=8) * 2  # the same batch on half as many replicas
    assert part(split, "generator", gpus=8) == pytest.approx(one / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel__tp": 3}, "8 GPUs are not divisible by tp\\*pp = 3\\*1"),
        ({"parallel__tp": 8}, "generator.heads 4 is not divisible by parallel.tp 8"),
        ({"train__global_batch_images": 40, "train__micro_batch_images": 8}, "global batch 40"),
        ({"parallel__pp": 8}, "8 chunks"),
    ],
)
def test_layouts_that_do_not_divide_say_why(settings, message):
    with pytest.raises(ValueError, match=message):
        estimate(varied(small_work(), **settings), cluster(8), EFFICIENCY)


def test_a_ring_moves_each_byte_past_all_but_one_rank():
    assert ring(800.0, 8) == 700.0


def test_groups_in_a_node_use_nvlink_and_others_their_network_cards():
    wires = Cluster(gpu=find_gpu("h800"), gpus=64)
    assert bus(wires, 8, 1) == pytest.approx(160e9)
    assert bus(wires, 64, 1) == pytest.approx(160e9)  # eight cards carry more than an H800's NVLink
    assert bus(wires, 8, 8) == pytest.approx(0.8 * 50e9)
    assert bus(Cluster(gpu=find_gpu("h100"), gpus=64), 64, 1) == pytest.approx(320e9)


def test_newton_schulz_counts_the_whole_matrix_of_split_ones():
    half = {"generator.double_blocks.0.image.mlp.first.weight": Weight((32, 16), True, (2, 1))}
    whole = {"generator.double_blocks.0.image.mlp.first.weight": Weight((64, 16))}
    assert newton_schulz_flops(half, 5) == newton_schulz_flops(whole, 5) > 0
    name = "generator.double_blocks.0.image.attention_out.weight"
    short_side = {name: Weight((16, 8), True, (1, 2))}
    assert newton_schulz_flops(short_side, 5) == newton_schulz_flops({name: Weight((16, 16))}, 5)
