"""Exact resume: whatever the layout, and wherever a run was stopped, the global batches are the same."""

import dataclasses
import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iomm.config import DataConfig
from iomm.data.batch import Batch, global_batch_indices
from iomm.data.indexer import index_shard
from iomm.data.loader import Loader
from tests.data.conftest import encode, noise_image

GLOBAL, STEPS, LARGE_FROM, TOKEN_PX = 12, 10, 5, 4
SHAPES = [(8, 8), (20, 20), (16, 5), (5, 16), (9, 8)]  # width, height
# (index, key, what is shown of it, caption) of one sample.
Shown = tuple[int, str, str, str | None]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> DataConfig:
    """120 images of several shapes, some damaged, most with captions; buckets, crops, flips, two stages."""
    folder = tmp_path_factory.mktemp("world")
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for n in range(part, 120, 2):
                data = encode(noise_image(n, 32).resize(SHAPES[n % len(SHAPES)]))
                files = [(f"{n:03}.png", data[:40] if n % 11 == 5 else data)]
                files += [(f"{n:03}.txt", f"image {n}".encode())] * (n % 4 < 3)
                for name, content in files:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        index_shard(str(folder / f"{part}.tar"))
    return settings_for(str(folder / "*.tar"))


def settings_for(shards: str) -> DataConfig:
    """Everything at once that may differ from sample to sample."""
    return DataConfig(
        images=(shards,),
        pairs=(shards,),
        mix_ratio=0.5,
        image_px=16,
        progression=((0, 8), (LARGE_FROM, 16)),
        crop="random",
        flip=True,
        buckets=True,
        shuffle_block_images=16,
        decode_threads=1,
    )


def open_loader(data: DataConfig, **changes) -> Loader:
    return Loader(
        dataclasses.replace(data, **changes),
        7,
        on_bad=lambda _: None,
        global_batch_images=GLOBAL,
        token_px=TOKEN_PX,
        tokenize=refuse_some,
    )


def refuse_some(caption: str) -> None:
    if caption.endswith("8"):
        raise ValueError("too long")


def shown(batch: Batch) -> list[Shown]:
    names = [view.name for view in batch.views]
    return list(zip(batch.index_B.tolist(), batch.keys, names, batch.captions, strict=True))


def steps_of(loader: Loader, first: int, micro: int, rank: int, ranks: int) -> Iterator[list[list[Shown]]]:
    """A rank's micro-batches, step by step."""
    loader.check_micro_batch(micro * ranks)
    numbers = [global_batch_indices(step, GLOBAL, micro, rank, ranks) for step in range(first, STEPS)]
    batches = loader.stream(indices for step in numbers for indices in step)
    for step in numbers:
        taken = [next(batches) for _ in step]
        assert all(
            batch.size_px == loader.size_px(indices[0]) for batch, indices in zip(taken, step, strict=True)
        )
        yield [shown(batch) for batch in taken]


@pytest.fixture(scope="module")
def whole(world) -> list[list[Shown]]:
    """The global batches of a run that nobody stopped, by one rank."""
    return [sum(step, []) for step in steps_of(open_loader(world), 0, GLOBAL, 0, 1)]


def test_the_run_meets_everything_that_could_differ(whole):
    samples = sum(whole, [])
    assert len({key for _, key, _, _ in samples}) > 30
    assert {view.endswith("flip") for _, _, view, _ in samples} == {True, False}
    pairs = sum(caption is not None for *_, caption in samples)
    assert abs(pairs - len(samples) / 2) < 3  # exact to a sample in each bucket
    assert all(int(key) % 11 != 5 for _, key, _, _ in samples)
    assert all(caption is None or not caption.endswith("8") for *_, caption in samples)
    sizes = [{view.split(" ")[0] for _, _, view, _ in step} for step in whole]
    assert all(len(size) == 1 for size in sizes)
    assert set.union(*sizes[:LARGE_FROM]) == {"8x8", "16x4", "4x16"}
    assert set.union(*sizes[LARGE_FROM:]) == {"16x16", "32x8", "8x32"}


def in_order(by_rank: Sequence[list[list[Shown]]]) -> list[Shown]:
    """A step's samples in the order of their indices, from what each rank has of it."""
    return [sample for micro_batch in zip(*by_rank, strict=True) for part in micro_batch for sample in part]


@settings(max_examples=10, deadline=None)
@given(schedule=st.randoms(use_true_random=False))
def test_a_run_killed_anywhere_goes_on_in_any_layout_with_the_same_batches(
    world, whole, schedule: random.Random
):
    step, seen = 0, []
    while step < STEPS:
        ranks = schedule.choice([1, 2, 3, 4])
        micro = schedule.choice([m for m in (1, 2, 3, 4, 6, 12) if GLOBAL % (m * ranks) == 0])
        kept = schedule.randint(1, STEPS - step)  # steps until it is killed
        threads, ahead = schedule.choice([1, 2, 4]), schedule.choice([0, 1, 3])
        loader = open_loader(world, decode_threads=threads, prefetch_batches=ahead)
        streams = [steps_of(loader, step, micro, rank, ranks) for rank in range(ranks)]
        for _ in range(kept):
            by_rank = [next(stream) for stream in streams]
            seen.append(in_order(by_rank))
        for stream in streams:
            stream.close()
        step += kept
    assert seen == whole


def test_the_order_in_which_samples_are_asked_for_changes_nothing(world, whole):
    loader = open_loader(world)
    indices = list(range(GLOBAL * STEPS))
    random.Random(0).shuffle(indices)
    found = {index: loader.sample(index) for index in indices}
    expected = sum(whole, [])
    assert [(i, found[i].key, found[i].view.name, found[i].caption) for i in range(len(expected))] == expected
    assert all(loader.size_px(i) == tuple(found[i].image_CHW.shape[1:]) for i in found)


def test_two_processes_of_which_one_is_killed_are_continued_by_one_of_another_layout(world, whole):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    script = Path(__file__).with_name("ranks_loader.py")
    command = [sys.executable, str(script), world.images[0], *"0312"]  # from step 0, 3 images, rank 1 of 2
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    here, seen = steps_of(open_loader(world), 0, 3, 0, 2), []
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        for _ in range(3):
            there = [[tuple(sample) for sample in part] for part in json.loads(other.stdout.readline())]
            seen.append(in_order([next(here), there]))
            other.stdin.write("go on\n")
            other.stdin.flush()
        other.kill()
    assert other.returncode == -signal.SIGKILL
    seen += [in_order([step]) for step in steps_of(open_loader(world, decode_threads=3), 3, 4, 0, 1)]
    assert seen == whole


def test_memory_does_not_grow_over_ten_epochs(world):
    loader = open_loader(world)

    def held_blocks(first: int, end: int) -> int:
        """Blocks of memory that Python objects hold after these samples."""
        for index in range(first, end):
            loader.sample(index)
        gc.collect()
        return sys.getallocatedblocks()

    epoch = 240  # images and pairs
    before = held_blocks(0, 2 * epoch)
    assert held_blocks(2 * epoch, 10 * epoch) - before < 1000  # less than one a sample
