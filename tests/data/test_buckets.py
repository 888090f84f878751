from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iomm.data.buckets import Dealing, Members, period_blocks, size_table, sizes_at

SIZES = [(512, 16), (1024, 16), (256, 16), (1024, 32), (64, 16), (768, 32)]


# The table of sizes


@pytest.mark.parametrize(("image_px", "token_px"), SIZES)
def test_sizes_are_whole_tokens_and_about_as_many_as_the_squares(image_px, token_px):
    table = size_table(image_px, token_px)
    tokens = [height * width // token_px**2 for height, width in table]
    square = (image_px // token_px) ** 2
    assert all(height % token_px == width % token_px == 0 for height, width in table)
    assert all(0.9 * square <= count <= square for count in tokens)
    assert (image_px, image_px) in table


@pytest.mark.parametrize(("image_px", "token_px"), SIZES)
def test_the_table_runs_from_tall_to_wide_and_each_size_has_its_mirror(image_px, token_px):
    table = size_table(image_px, token_px)
    ratios = [width / height for height, width in table]
    assert ratios == sorted(set(ratios))
    assert (ratios[0], ratios[-1]) == (0.25, 4.0)
    assert set(table) == {(width, height) for height, width in table}


def test_large_squares_have_41_sizes_whose_tokens_eight_ranks_can_share():
    table = size_table(1024, 16)
    assert len(table) == 41
    assert all(height * width // 256 % 8 == 0 for height, width in table)
    assert max(b[1] * a[0] / (b[0] * a[1]) for a, b in zip(table, table[1:], strict=False)) < 1.1


def test_a_bucket_keeps_its_shape_at_other_resolutions():
    table = size_table(1024, 16)
    small = sizes_at(256, 16, [width / height for height, width in table])
    assert len(small) == len(table)
    for (height, width), (small_height, small_width) in zip(table, small, strict=True):
        assert abs(np.log(width / height) - np.log(small_width / small_height)) < 0.2
        assert small_height * small_width <= 256**2


def test_a_square_of_broken_tokens_is_an_error():
    with pytest.raises(ValueError, match="a square of 500 px is not made of whole latent tokens of 16 px"):
        size_table(500, 16)


# Membership

TABLE = ((8, 2), (4, 4), (2, 8))


def members(*sizes: tuple[int, int], least_images: int = 1) -> Members:
    return Members.of([np.array(sizes, np.int32).reshape(-1, 2)], TABLE, least_images)


def test_an_image_belongs_to_the_bucket_of_the_nearest_ratio():
    found = members((100, 100), (100, 10), (10, 100), (100, 60), (100, 40), (40, 100), (0, 0))
    assert [found.bucket(i) for i in range(7)] == [1, 2, 0, 1, 2, 0, 1]
    assert found.counts_K.tolist() == [2, 3, 2]


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=4000), min_size=1))
def test_the_members_of_a_bucket_are_its_images_in_order(parts):
    chunks = [np.array([part] * 5, np.int32).reshape(-1, 2) for part in parts if part]
    if not chunks:
        return
    found = Members.of(chunks, TABLE, 1)
    by_bucket = [[found.number(b, n) for n in range(0, found.counts_K[b], 7)] for b in range(3)]
    ids = [found.bucket(i) for i in range(found.counts_K.sum())]
    assert by_bucket == [[i for i, b in enumerate(ids) if b == bucket][::7] for bucket in range(3)]


def test_images_of_buckets_that_are_too_small_go_to_the_nearest_one():
    sizes = [(10, 10)] * 5 + [(40, 10)] * 2 + [(10, 40)] * 3
    assert members(*sizes, least_images=3).counts_K.tolist() == [3, 7, 0]
    assert members(*sizes, least_images=4).counts_K.tolist() == [0, 10, 0]
    assert members(*sizes, least_images=99).counts_K.tolist() == [0, 10, 0]


# Dealing

counts = st.lists(st.integers(0, 10**7), min_size=5, max_size=5).filter(any).map(np.array)


@settings(max_examples=40, deadline=None)
@given(images=counts, pairs=counts, share=st.integers(0, 40).map(lambda n: n / 40))
def test_the_shares_of_both_sources_are_exact_and_blocks_proportional_to_images(images, pairs, share):
    dealing = Dealing(images if share else None, pairs if share < 1 else None, share)
    period = period_blocks(share)
    buckets = [dealing.at(block)[0] for block in range(period)]
    blocks = np.bincount(buckets, minlength=5)
    assert sum(int(blocks[b]) * dealing.mix[b] for b in range(5)) == period * Fraction(repr(share))
    wanted = period * (share * images / images.sum() + (1 - share) * pairs / pairs.sum())
    assert np.abs(blocks - wanted).max() < 2


def test_a_buckets_blocks_are_counted_over_periods_and_spread_evenly():
    dealing = Dealing(np.array([300, 100, 0]), None, 1.0)
    period, seen = period_blocks(1.0), {0: 0, 1: 0}
    for block in range(2 * period + 9):
        bucket, before = dealing.at(block)
        assert before == seen[bucket]
        seen[bucket] += 1
        assert abs(seen[0] - 0.75 * (block + 1)) <= 1


def test_a_bucket_without_pairs_has_images_only():
    dealing = Dealing(np.array([50, 50, 0]), np.array([0, 30, 30]), 0.5)
    assert dealing.mix == [1, Fraction(1, 2), 0]


def test_a_mix_ratio_of_many_decimals_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.mix_ratio 0\.12345 with data\.buckets: at most four decimals"
    ):
        Dealing(np.array([1]), np.array([1]), 0.12345)
