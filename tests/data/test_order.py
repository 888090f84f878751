from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iomm.data.order import RUNS, shuffled
from iomm.random import permute


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 700),
    block=st.integers(1, 300),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 50),
)
def test_an_epoch_holds_every_sample_once(length, block, seed, epoch):
    assert sorted(shuffled(p, length, seed, epoch, block) for p in range(length)) == list(range(length))


@given(length=st.integers(1, 4096), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_a_source_of_one_block_is_shuffled_as_a_whole(length, seed, epoch):
    places = range(0, length, 97)
    assert [shuffled(p, length, seed, epoch, 4096) for p in places] == [
        permute(p, length, seed, epoch) for p in places
    ]


def test_a_blocks_samples_come_from_a_few_stretches_of_neighbours():
    length, block = 11_000_003, 4096
    for first in (0, 40 * block, length - length % block - block):
        samples = sorted(shuffled(first + n, length, 3, 1, block) for n in range(block))
        jumps = sum(b - a > 1 for a, b in zip(samples, samples[1:], strict=False))
        assert RUNS // 2 <= jumps <= RUNS


def test_a_block_is_well_mixed_and_its_stretches_lie_anywhere():
    length, block = 1_000_000, 4096
    samples = [shuffled(n, length, 3, 0, block) for n in range(block)]
    runs = [sample // (block // RUNS) for sample in samples]
    assert all(len(set(runs[first : first + 256])) == len(set(runs)) for first in range(0, block, 256))
    tenths = Counter(
        sample * 10 // length for n in range(20) for sample in [shuffled(n * block, length, 3, 0, block)]
    )
    assert len(tenths) >= 6


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(shuffled(p, 1000, seed, epoch, 64) for p in range(50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_a_place_costs_the_same_in_a_set_of_any_size():
    assert 0 <= shuffled(10**12 - 1, 10**12, 0, 0, 4096) < 10**12


@pytest.mark.parametrize("position", [-1, 5000])
def test_a_position_outside_the_epoch_is_an_error(position):
    with pytest.raises(ValueError, match=r"outside the permutation's range \[0, 5000\)"):
        shuffled(position, 5000, 0, 0, 64)
