"""How blocks are dealt to pipeline chunks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iomm.parallel.stages import Chunk, chunks_of, split, whole


def _most_expensive(ranges: list[range], costs: list[int], first: int, last: int) -> int:
    sums = [sum(costs[i] for i in r) for r in ranges]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.data())
def test_a_split_is_contiguous_complete_and_as_balanced_as_any_other(costs, data):
    chunks = data.draw(st.integers(1, len(costs)))
    first, last = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30))
    ranges = split(costs, chunks, first_cost=first, last_cost=last)
    assert len(ranges) == chunks
    assert [i for r in ranges for i in r] == list(range(len(costs)))
    assert all(ranges)
    every = (
        [range(*pair) for pair in itertools.pairwise((0, *cuts, len(costs)))]
        for cuts in itertools.combinations(range(1, len(costs)), chunks - 1)
    )
    best = min(_most_expensive(ranges, costs, first, last) for ranges in every)
    assert _most_expensive(ranges, costs, first, last) == best


def test_equal_blocks_are_dealt_evenly_even_where_an_uneven_split_is_as_good():
    assert [len(r) for r in split([1] * 8, 4)] == [2, 2, 2, 2]
    assert sorted(len(r) for r in split([1] * 10, 4)) == [2, 2, 3, 3]


def test_a_stage_that_does_more_besides_gets_fewer_blocks():
    assert [len(r) for r in split([1] * 8, 2, first_cost=2)] == [3, 5]
    assert [len(r) for r in split([1] * 8, 2, last_cost=2)] == [5, 3]
    assert [len(r) for r in split([2, 2, 2, 1, 1, 1, 1, 1, 1], 2)] == [3, 6]


@pytest.mark.parametrize("chunks", [0, 4])
def test_chunks_without_a_block_are_refused(chunks):
    with pytest.raises(ValueError, match=f"3 blocks cannot be cut into .* = {chunks} chunks.*Lower"):
        split([1, 1, 1], chunks)


def test_virtual_stages_interleave_over_the_ranks():
    ranges = split([1] * 8, 4)
    assert chunks_of(ranges, 0, 2) == (Chunk(True, False, range(0, 2)), Chunk(False, False, range(4, 6)))
    assert chunks_of(ranges, 1, 2) == (Chunk(False, False, range(2, 4)), Chunk(False, True, range(6, 8)))
    assert chunks_of(split([1] * 5, 1), 0, 1) == (whole(5),)
