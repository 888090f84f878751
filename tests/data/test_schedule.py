import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from iomm.config import DataConfig
from iomm.data.mixture import Kind, draw
from iomm.data.schedule import Schedule
from iomm.data.view import View

DATA = DataConfig(images=("i",), pairs=("p",), image_px=64, mix_ratio=0.5)
SHAPES = ((100, 100), (200, 50), (50, 200), (0, 0))


class Sizes:
    """A source of which only the sizes of its images count."""

    def __init__(self, *counts: int) -> None:
        self._sizes = np.array([SHAPES[shape] for shape, n in enumerate(counts) for _ in range(n)], np.int32)

    def __len__(self) -> int:
        return len(self._sizes)

    def sizes_by_shard(self) -> list[NDArray[np.int32]]:
        return [self._sizes[:7], self._sizes[7:]]


class Unindexed(Sizes):
    def sizes_by_shard(self):
        raise ValueError("a shard without an index (x.tar). Make the index: iomm shard index TAR...")


def schedule(
    images: Sizes, pairs: Sizes | None = None, *, batch: int | None = 8, seed: int = 5, **changes
) -> Schedule:
    data = dataclasses.replace(DATA, **{"mix_ratio": 1.0 if pairs is None else 0.5, **changes})
    sources: Any = {"image": images} if pairs is None else {"image": images, "pair": pairs}
    return Schedule(data, seed, sources, global_batch_images=batch, token_px=16)


def numbers(found: Schedule, indices: range) -> dict[tuple[Kind, int], list[int]]:
    """Images by kind and bucket, in the order of the indices."""
    out: dict[tuple[Kind, int], list[int]] = {}
    for index in indices:
        slot = found.slot(index)
        out.setdefault((slot.kind, slot.bucket), []).append(found.number(slot))
    return out


def test_without_buckets_kinds_follow_the_mixture_and_each_epoch_is_a_permutation():
    found = schedule(Sizes(40), Sizes(30))
    assert [(found.slot(i).kind, found.slot(i).position) for i in range(50)] == [
        draw(i, 0.5) for i in range(50)
    ]
    by_kind = numbers(found, range(160))
    assert sorted(by_kind["image", 0][:40]) == sorted(by_kind["image", 0][40:]) == list(range(40))
    assert sorted(by_kind["pair", 0][:30]) == list(range(30))
    assert by_kind["image", 0][:40] != by_kind["image", 0][40:]


def test_after_an_image_that_cannot_be_used_the_next_of_its_order_comes():
    found = schedule(Sizes(9))
    slots = [found.slot(i) for i in range(9)]
    order = [found.number(slot) for slot in slots]
    assert [found.number(slots[4], attempt) for attempt in range(9)] == order[4:] + order[:4]


def test_every_epoch_of_a_bucket_shows_each_of_its_images_once():
    found = schedule(Sizes(60, 20, 24, 2), Sizes(30, 10, 0), buckets=True)
    seen = numbers(found, range(8 * 400))
    images = {b: n for (kind, b), n in seen.items() if kind == "image"}
    members = {tuple(sorted(set(n))) for n in images.values()}
    assert members == {tuple([*range(60), 104, 105]), tuple(range(60, 80)), tuple(range(80, 104))}
    for shown in seen.values():
        size = len(set(shown))
        assert all(len(set(shown[e : e + size])) == size for e in range(0, len(shown) - size, size))


def test_all_images_of_a_block_have_one_size_and_blocks_are_dealt_in_proportion():
    found = schedule(Sizes(600, 200, 200), buckets=True, bucket_block_images=4)
    sizes = [{found.size_px(block * 4 + n) for n in range(4)} for block in range(1000)]
    assert all(len(size) == 1 for size in sizes)
    assert Counter(size.pop() for size in sizes) == {(64, 64): 600, (32, 128): 200, (128, 32): 200}


def test_the_sizes_to_come_are_those_of_buckets_that_have_images():
    assert schedule(Sizes(60)).sizes_px == [(64, 64)]
    found = schedule(Sizes(60, 20), buckets=True, progression=((0, 32), (5, 64)))
    assert sorted(found.sizes_px) == [(16, 64), (32, 32), (32, 128), (64, 64)]


def test_the_share_of_pairs_is_exact_though_buckets_have_none():
    found = schedule(Sizes(600, 200, 200), Sizes(500), buckets=True)
    kinds = Counter(found.slot(i).kind for i in range(8 * 4096))
    assert kinds["image"] == kinds["pair"]
    assert {found.size_px(i) for i in range(8 * 4096) if found.slot(i).kind == "pair"} == {(64, 64)}


def test_sources_that_share_no_bucket_keep_their_shares():
    found = schedule(Sizes(0, 100), Sizes(0, 0, 100), buckets=True, mix_ratio=0.3)
    kinds = Counter(found.slot(i).kind for i in range(8 * 4100))
    assert kinds == {"image": 8 * 1230, "pair": 8 * 2870}


def test_the_resolution_changes_at_its_step_and_the_images_go_on():
    stages = ((0, 32), (3, 48), (10, 64))
    plain, growing = schedule(Sizes(50)), schedule(Sizes(50), progression=stages)
    assert [growing.size_px(8 * step + 7) for step in (0, 2, 3, 9, 10, 99)] == [
        (px, px) for px in (32, 32, 48, 48, 64, 64)
    ]
    assert all(growing.number(growing.slot(i)) == plain.number(plain.slot(i)) for i in range(120))


def test_buckets_keep_their_images_through_a_progression():
    plain = schedule(Sizes(60, 20, 20), buckets=True)
    growing = schedule(Sizes(60, 20, 20), buckets=True, progression=((0, 32), (5, 64)))
    assert all(growing.slot(i) == plain.slot(i) for i in range(200))
    assert {growing.size_px(i) for i in range(40)} <= {(32, 32), (16, 64), (64, 16)}
    assert all(growing.size_px(i) == plain.size_px(i) for i in range(40, 200))


def test_views_are_centred_unless_asked_otherwise():
    assert schedule(Sizes(5)).view(3) == View(64, 64)
    assert schedule(Sizes(5)).plain_view("image", 2) == View(64, 64)


def test_crops_and_flips_are_drawn_by_index_and_seed():
    def drawn(seed: int) -> list[View]:
        found = schedule(Sizes(5), crop="random", flip=True, seed=seed)
        return [found.view(i) for i in range(400)]

    views = drawn(1)
    assert views == drawn(1)
    assert views != drawn(2)
    assert len({view.crop for view in views}) == 400
    assert abs(sum(view.flip for view in views) - 200) < 60
    for axis in (0, 1):
        assert abs(np.mean([view.crop[axis] for view in views if view.crop]) - 0.5) < 0.08
    flipped_only = schedule(Sizes(5), flip=True, seed=1)
    assert [flipped_only.view(i).flip for i in range(50)] == [view.flip for view in views[:50]]
    assert flipped_only.view(0).crop is None


def test_captions_are_chosen_by_index_all_of_them_equally_often():
    found = schedule(Sizes(5))
    assert {found.caption(i, 1) for i in range(10)} == {0}
    counts = Counter(found.caption(i, 4) for i in range(2000))
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 400


# Refusals


def test_a_micro_batch_that_would_hold_two_sizes_is_refused():
    found = schedule(Sizes(60, 20, 20), buckets=True, bucket_block_images=4)
    for images in (1, 2, 4):
        found.check_micro_batch(images)
    with pytest.raises(ValueError, match=r"data\.bucket_block_images 4 is not a multiple of the 8 images"):
        found.check_micro_batch(8)
    schedule(Sizes(50)).check_micro_batch(7)


def test_buckets_without_an_index_are_refused_with_the_command_that_makes_one():
    with pytest.raises(
        ValueError, match=r"data\.buckets needs .* data\.images has .*x\.tar.*iomm shard index"
    ):
        schedule(Unindexed(50), buckets=True)


@pytest.mark.parametrize("changes", [{"buckets": True}, {"progression": ((0, 32), (1, 64))}])
def test_what_needs_the_size_of_a_step_says_so(changes):
    with pytest.raises(ValueError, match="the loader needs the global batch size"):
        schedule(Sizes(50), batch=None, **changes)


def test_a_negative_index_is_refused_with_buckets_too():
    with pytest.raises(ValueError, match="index -1 is negative"):
        schedule(Sizes(50), buckets=True).slot(-1)
