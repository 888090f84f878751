from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iomm.data.mixture import draw

ratios = st.one_of(
    st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0, 1e-5]),
    st.floats(0.0, 1.0, allow_subnormal=False),
)


@settings(deadline=None)
@given(ratio=ratios, n=st.integers(1, 300))
def test_every_prefix_holds_each_kind_in_its_share_to_within_one_sample(ratio, n):
    images = sum(draw(i, ratio)[0] == "image" for i in range(n))
    assert abs(images - n * Fraction(repr(ratio))) < 1


@settings(deadline=None)
@given(ratio=ratios, start=st.integers(0, 10**12))
def test_positions_within_each_kind_count_up_by_one_without_gaps(ratio, start):
    following = {}
    for index in range(start, start + 50):
        kind, position = draw(index, ratio)
        assert position == following.get(kind, position)
        following[kind] = position + 1


@settings(deadline=None)
@given(ratio=ratios, index=st.integers(0, 10**15))
def test_positions_of_both_kinds_before_an_index_sum_to_it(ratio, index):
    kind, position = draw(index, ratio)
    images = index * Fraction(repr(ratio)) // 1
    assert position == (images if kind == "image" else index - images)


def test_a_ratio_of_one_half_alternates():
    assert [draw(i, 0.5) for i in range(4)] == [("pair", 0), ("image", 0), ("pair", 1), ("image", 1)]


def test_a_tenth_stays_exact_after_ten_billion_samples():
    assert draw(10**10 - 1, 0.1) == ("image", 10**9 - 1)


def test_the_ends_draw_from_one_source_only():
    assert draw(7, 1.0) == ("image", 7)
    assert draw(7, 0.0) == ("pair", 7)


def test_a_ratio_out_of_range_and_a_negative_index_are_errors():
    with pytest.raises(ValueError, match=r"mix ratio 1.5 must lie in \[0, 1\]"):
        draw(0, 1.5)
    with pytest.raises(ValueError, match="index -1 is negative"):
        draw(-1, 0.5)
