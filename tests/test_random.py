"""Counter-based randomness: known answers, independence, permutations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iomm.random import Stream, normal, permute, philox4x32, uniform, words, words_of


def test_philox_gives_the_published_known_answers():
    # Random123's kat_vectors, philox4x32-10.
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(w) for w in philox4x32((zero,) * 4, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = zero + 0xFFFFFFFF
    out = philox4x32((ones,) * 4, 0xFFFFFFFFFFFFFFFF)
    assert [int(w) for w in out] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_draws_do_not_depend_on_the_batch_they_are_made_in():
    index = torch.tensor([5, 2**40 + 3, 17])
    together = normal(9, Stream.NOISE, index, 11)
    for i in range(3):
        assert torch.equal(normal(9, Stream.NOISE, index[i : i + 1], 11)[0], together[i])


@given(seed=st.integers(0, 2**64 - 1), stream=st.sampled_from(list(Stream)), index=st.integers(0, 2**63 - 1))
def test_plain_integers_draw_the_same_words(seed, stream, index):
    assert list(words_of(seed, stream, index)) == words(seed, stream, torch.tensor([index]), 4)[0].tolist()


def test_a_longer_draw_begins_with_the_shorter_one():
    index = torch.arange(4)
    assert torch.equal(words(1, Stream.MASK, index, 40)[:, :13], words(1, Stream.MASK, index, 13))


@pytest.mark.parametrize(
    "other", [(2, Stream.NOISE, 0), (1, Stream.MASK, 0), (1, Stream.NOISE, 1), (1 + 2**32, Stream.NOISE, 0)]
)
def test_seed_stream_and_index_each_change_the_draw(other):
    seed, stream, index = other
    base = words(1, Stream.NOISE, torch.tensor([0]), 64)
    assert (base == words(seed, stream, torch.tensor([index]), 64)).sum() == 0


def test_uniform_stays_inside_the_open_interval_and_has_its_moments():
    u = uniform(3, Stream.TIMESTEP, torch.arange(2000), 100)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 2e-3


def test_normal_has_its_moments_and_tails():
    z = normal(3, Stream.NOISE, torch.arange(2000), 101)
    assert z.shape == (2000, 101)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs((z.abs() > 2).float().mean() - math.erfc(2 / math.sqrt(2))) < 2e-3
    assert abs((z[:, 0] * z[:, 1]).mean()) < 0.08  # the two outputs of one Box-Muller pair


@given(length=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_permute_visits_every_entry_once(length, seed, epoch):
    assert sorted(permute(i, length, seed, epoch) for i in range(length)) == list(range(length))


def test_permute_changes_with_seed_and_epoch():
    orders = {tuple(permute(i, 100, seed, epoch) for i in range(100)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_permute_refuses_a_position_outside_its_range():
    with pytest.raises(ValueError, match=r"position 5 is outside the permutation's range \[0, 5\)"):
        permute(5, 5, 0, 0)
