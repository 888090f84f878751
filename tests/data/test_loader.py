from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iomm.config import DataConfig
from iomm.data.cache import cache_key
from iomm.data.decode import decode_image
from iomm.data.decode_cpu import CpuDecoder
from iomm.data.errors import BadSample, BadSampleReport
from iomm.data.loader import Loader, Sample, global_batch_indices
from iomm.data.mixture import draw
from tests.data.conftest import KEYS, encode, loader, never, noise_image

EMOJI = Path(__file__).parents[2] / "examples" / "data" / "fluent_emoji"


def assert_same_sample(one: Sample, other: Sample) -> None:
    assert (one.index, one.key, one.content_hash, one.caption) == (
        other.index,
        other.key,
        other.content_hash,
        other.caption,
    )
    assert torch.equal(one.image_CHW, other.image_CHW)


def test_a_sample_is_the_image_its_key_names(shard):
    sample = loader(shard).sample(1)
    data = encode(noise_image(KEYS.index(sample.key)))
    assert sample.content_hash == cache_key(data)
    assert torch.equal(sample.image_CHW, decode_image(data, 8))


def test_each_epoch_holds_every_sample_of_each_source_once_in_an_order_of_its_own(shard):
    source = loader(shard, mix_ratio=0.7)
    order = {"image": [], "pair": []}
    for index in range(70):
        order[draw(index, 0.7)[0]].append(source.sample(index).key)
    images = [tuple(order["image"][start : start + 7]) for start in range(0, 49, 7)]
    pairs = [tuple(order["pair"][start : start + 3]) for start in range(0, 21, 3)]
    assert all(sorted(epoch) == list(KEYS) for epoch in images)
    assert all(sorted(epoch) == ["a", "b", "c"] for epoch in pairs)
    assert len(set(images)) > 1
    assert len(set(pairs)) > 1


def test_only_pairs_carry_captions(shard):
    source = loader(shard)
    for index in range(20):
        sample = source.sample(index)
        captions = {"a": "the first", "b": "the second", "c": "the third"}
        assert sample.caption == (captions[sample.key] if draw(index, 0.5)[0] == "pair" else None)


def test_a_sample_depends_on_nothing_asked_before(shard):
    forward, backward = loader(shard), loader(shard)
    there = [forward.sample(i) for i in range(12)]
    back = [backward.sample(i) for i in reversed(range(12))][::-1]
    for one, other in zip(there, back, strict=True):
        assert_same_sample(one, other)


def test_another_seed_gives_another_order(shard):
    orders = {
        "".join(loader(shard, seed=seed, mix_ratio=1.0).sample(i).key for i in range(7)) for seed in range(5)
    }
    assert len(orders) > 1


def test_images_and_pairs_of_one_shard_do_not_march_in_step(write_shard, png):
    members = [
        (f"{n:02}{suffix}", data) for n in range(20) for suffix, data in ((".png", png(n)), (".txt", b"x"))
    ]
    source = loader(write_shard("train.tar", members))
    keys = [source.sample(i).key for i in range(40)]
    assert keys[0::2] != keys[1::2]


def test_an_index_far_beyond_the_first_epoch_is_as_good_as_any(shard):
    assert loader(shard).sample(10**12 + 1).key in KEYS


# Bad samples


def test_an_unreadable_image_is_replaced_and_reported_once(damaged):
    reports: list[BadSampleReport] = []
    source = loader(damaged, pairs=(), mix_ratio=1.0, on_bad=reports.append)
    keys = [source.sample(i).key for i in range(28)]
    assert set(keys) == set("acdf")
    assert sorted(r.key for r in reports) == ["b", "e", "g"]
    assert {r.key: r.reason for r in reports}["e"] == "the file is empty"
    assert all(r.shard == damaged and r.key in str(r) and damaged in str(r) for r in reports)


def test_the_replacement_is_the_next_sample_of_the_same_order(damaged, shard):
    whole = [loader(shard, pairs=(), mix_ratio=1.0).sample(i).key for i in range(7)]
    source = loader(damaged, pairs=(), mix_ratio=1.0, on_bad=lambda _: None)
    for place in range(7):
        following = [key for key in (whole[place:] + whole[:place]) if key in "acdf"]
        assert source.sample(place).key == following[0]


def test_replacements_do_not_depend_on_what_was_asked_before(damaged):
    used = loader(damaged, pairs=(), mix_ratio=1.0, on_bad=lambda _: None)
    for index in range(30):
        used.sample(index)
    for index in range(14):
        fresh = loader(damaged, pairs=(), mix_ratio=1.0, on_bad=lambda _: None)
        assert_same_sample(used.sample(index), fresh.sample(index))


class HalfBlind:
    """A decoder that finds fault with what lies in the left half of some images."""

    whole_batches = False

    def decode(self, files, views, into=None):
        decoded = CpuDecoder().decode(files, views)
        bad = [view.crop[0] < 0.5 and sum(data) % 2 == 0 for data, view in zip(files, views, strict=True)]
        return [BadSample("torn there") if b else image for b, image in zip(bad, decoded, strict=True)]


def test_an_image_that_is_bad_in_one_view_only_is_used_in_the_others(write_shard, monkeypatch):
    files = [encode(noise_image(seed, 8 + seed)) for seed in range(12)]
    shard = write_shard("twelve.tar", [(f"{n:02}.png", data) for n, data in enumerate(files)])
    monkeypatch.setattr("iomm.data.loader.open_decoder", lambda data: HalfBlind())
    changes = {"pairs": (), "mix_ratio": 1.0, "crop": "random", "on_bad": lambda _: None}
    used = loader(shard, **changes)
    history = [used.sample(index) for index in range(48)]
    for index in range(24, 48):
        assert_same_sample(history[index], loader(shard, **changes).sample(index))
    blind = {f"{n:02}" for n, data in enumerate(files) if sum(data) % 2 == 0}
    assert blind & {sample.key for sample in history[24:]}


def test_a_sample_with_a_bad_caption_is_no_pair_but_still_an_image(write_shard, png):
    members = [("a.png", png(0)), ("a.txt", b"\xff"), ("b.png", png(1)), ("b.txt", b"fine")]
    reports: list[BadSampleReport] = []
    source = loader(write_shard("train.tar", members), on_bad=reports.append)
    samples = [source.sample(i) for i in range(12)]
    assert {s.key for s in samples if s.caption is not None} == {"b"}
    assert {s.key for s in samples if s.caption is None} == {"a", "b"}
    assert [(r.key, r.reason) for r in reports] == [("a", "the caption is not UTF-8: byte 0 is 0xff")]


def test_a_source_with_no_readable_image_is_an_error(write_shard):
    path = write_shard("train.tar", [("a.png", b""), ("b.png", b"")])
    reports: list[BadSampleReport] = []
    with pytest.raises(ValueError, match="no readable image among the 2 samples of .*train.tar"):
        loader(path, pairs=(), mix_ratio=1.0, on_bad=reports.append).sample(0)
    assert len(reports) == 2


# Settings


def test_missing_shards_are_said_when_the_loader_is_built(shard):
    for changes in ({"pairs": ("nowhere.tar",)}, {"heldout": ("nowhere.tar",)}):
        with pytest.raises(FileNotFoundError, match="nowhere.tar"):
            loader(shard, **changes)


def test_sources_that_are_never_drawn_from_are_not_opened(shard):
    only_images = loader(shard, pairs=("nowhere.tar",), mix_ratio=1.0)
    assert (only_images.size("image"), only_images.size("pair")) == (7, 0)
    only_pairs = loader(shard, mix_ratio=0.0)
    assert (only_pairs.size("image"), only_pairs.size("pair")) == (0, 3)


def test_thread_and_prefetch_counts_out_of_range_are_errors(shard):
    with pytest.raises(ValueError, match="decode_threads 0 must be at least 1"):
        loader(shard, decode_threads=0)
    with pytest.raises(ValueError, match="prefetch_batches -1 must not be negative"):
        loader(shard, prefetch_batches=-1)


# Held-out samples


def test_held_out_samples_come_in_shard_order_with_captions_and_without_bad_ones(write_shard, png, shard):
    members = [("p.png", png(0)), ("p.txt", b"one"), ("q.png", b""), ("q.txt", b"two"), ("r.png", png(2))]
    members += [("s.png", png(3)), ("s.txt", b"four")]
    reports: list[BadSampleReport] = []
    source = loader(shard, heldout=(write_shard("heldout.tar", members),), on_bad=reports.append)
    batch = source.heldout(2)
    assert source.heldout_size == 3
    assert (batch.keys, batch.captions, batch.index_B.tolist()) == (("p", "s"), ("one", "four"), [0, 1])
    assert [report.key for report in reports] == ["q"]
    with pytest.raises(ValueError, match="has 2 readable captioned samples, fewer than the 3 asked for"):
        source.heldout(3)


def test_held_out_samples_without_shards_or_without_a_count_are_errors(shard):
    with pytest.raises(ValueError, match="has 0 readable captioned samples"):
        loader(shard).heldout(1)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        loader(shard).heldout(0)


# Ranks


@settings(deadline=None)
@given(
    step=st.integers(0, 10**6),
    micro=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 4]),
    accumulate=st.integers(1, 3),
)
def test_all_ranks_together_cover_a_steps_samples_once(step, micro, dp, accumulate):
    size = micro * dp * accumulate
    ranks = [global_batch_indices(step, size, micro, rank, dp) for rank in range(dp)]
    assert all(len(batches) == accumulate and all(len(b) == micro for b in batches) for batches in ranks)
    assert Counter(i for batches in ranks for b in batches for i in b) == Counter(
        range(step * size, (step + 1) * size)
    )
    for m in range(accumulate):
        across = [i for batches in ranks for i in batches[m]]
        assert across == list(range(across[0], across[0] + micro * dp))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)
@given(step=st.integers(0, 20))
def test_a_step_sees_the_same_samples_under_every_split(shard, step):
    source = loader(shard)
    seen = set()
    for dp, micro in ((1, 8), (1, 2), (2, 4), (2, 1), (4, 2)):
        batches = [b for rank in range(dp) for b in global_batch_indices(step, 8, micro, rank, dp)]
        samples = [source.sample(index) for batch in batches for index in batch]
        seen.add(tuple(sorted((s.index, s.key, s.caption or "") for s in samples)))
    assert len(seen) == 1


def test_a_global_batch_that_does_not_divide_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match=r"global batch 10 is not divisible by .* = 2\*4 = 8\. Change train"):
        global_batch_indices(0, 10, 2, 0, 4)


@pytest.mark.parametrize("arguments", [(-1, 8, 2, 0, 2), (0, 8, 2, 2, 2), (0, 8, 0, 0, 2), (0, 0, 1, 0, 1)])
def test_ranks_and_sizes_out_of_range_are_errors(arguments):
    with pytest.raises(ValueError, match="must not be negative"):
        global_batch_indices(*arguments)


# The shipped images


def test_the_shipped_emoji_load_with_captions_where_they_are_released():
    data = DataConfig(
        images=(str(EMOJI / "train-*.tar"),),
        pairs=(str(EMOJI / "train-*.tar"),),
        heldout=(str(EMOJI / "heldout-*.tar"),),
        mix_ratio=0.5,
        image_px=64,
    )
    source = Loader(data, 0, on_bad=never)
    assert (source.size("image"), source.size("pair"), source.heldout_size) == (1681, 382, 171)
    (batch,) = source.stream(global_batch_indices(0, 32, 32, 0, 1))
    assert sum(caption is not None for caption in batch.captions) == 16
    assert batch.image_BCHW.shape == (32, 3, 64, 64)
    assert all(source.heldout(8).captions)
