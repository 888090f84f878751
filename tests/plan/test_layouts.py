"""Search and ranking of layouts."""

import dataclasses

import pytest

from iomm.plan.calibration import Efficiency
from iomm.plan.hardware import Cluster
from iomm.plan.layouts import describe, parse_layout, rank, why_too_large, with_layout
from tests.plan.small_plans import H800, cluster, small_work

EFFICIENCY = Efficiency()


def test_layouts_come_the_fastest_first_and_all_fit():
    ranked = rank(small_work(), cluster(8), EFFICIENCY, {"recompute": "none"})
    assert len(ranked.feasible) > 10 and all(made.fits for made in ranked.feasible)
    seconds = [made.seconds for made in ranked.feasible]
    assert seconds == sorted(seconds)


def test_refused_layouts_are_counted_by_reason():
    refused = rank(small_work(), cluster(8), EFFICIENCY, {"recompute": "none"}).refused
    (heads,) = [found for reason, found in refused.items() if "heads" in reason]
    assert heads[0] == "generator.heads 4 is not divisible by parallel.tp 8."


def test_fixed_settings_stay():
    ranked = rank(small_work(), cluster(8), EFFICIENCY, {"tp": 2, "micro": 4})
    assert {made.work.config.parallel.tp for made in ranked.feasible} == {2}
    assert {made.work.config.train.micro_batch_images for made in ranked.feasible} == {4}


def test_a_layout_that_needs_too_much_memory_says_of_what():
    gpu = dataclasses.replace(H800, memory_bytes=20e6, reserve_bytes=0.0)
    ranked = rank(small_work(), Cluster(gpu=gpu, gpus=1), EFFICIENCY)
    assert ranked.too_large and "GiB of 0 (" in why_too_large(ranked.too_large[0])


def test_no_possible_layout_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"no layout of 7 GPUs is possible\. \d+ layouts: "):
        rank(small_work(), cluster(7), EFFICIENCY)


def test_a_written_layout_becomes_settings():
    layout = parse_layout("tp=2,sp=true,pp=4,vpp=2,micro=8,recompute=full,encoders=shared")
    work = with_layout(small_work(), layout)
    parallel = work.config.parallel
    assert describe(parallel, 8) == "tp 2 + sp, pp 4 x 2, full recompute, shared encoders, micro 8"
    assert work.config.train.micro_batch_images == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [("cp=2", "unknown key 'cp'"), ("tp=two", "no usable value"), ("recompute=some", "no usable value")],
)
def test_a_layout_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(text)
