import threading

import pytest
import torch

from iomm.data.errors import BadSampleReport
from iomm.data.loader import Batch
from tests.data.conftest import loader


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_a_stream_gives_the_samples_in_order_whatever_the_threads_and_prefetch(damaged, threads, prefetch):
    changes = {"pairs": (), "mix_ratio": 1.0, "decode_threads": threads, "prefetch_batches": prefetch}
    source = loader(damaged, on_bad=lambda _: None, **changes)
    groups = [[0, 1, 2], [9, 4], [5], [5, 5]]
    batches = list(source.stream(groups))
    assert [batch.index_B.tolist() for batch in batches] == groups
    for group, batch in zip(groups, batches, strict=True):
        expected = Batch.stack([source.sample(index) for index in group])
        assert (batch.keys, batch.hashes, batch.captions) == (
            expected.keys,
            expected.hashes,
            expected.captions,
        )
        assert torch.equal(batch.image_BCHW, expected.image_BCHW)
        assert batch.image_BCHW.shape == (len(group), 3, 8, 8)
        assert batch.index_B.dtype == torch.int64


def test_a_stream_reads_ahead_no_further_than_asked(shard):
    taken = []

    def endless():
        for index in range(10**9):
            taken.append(index)
            yield [index]

    batches = loader(shard, prefetch_batches=2).stream(endless())
    for _ in range(3):
        next(batches)
    batches.close()
    assert len(taken) == 5


def decoding_threads() -> int:
    return sum(thread.name.startswith("iomm-decode") for thread in threading.enumerate())


def test_closing_a_stream_ends_its_threads(shard):
    batches = loader(shard).stream([[i] for i in range(50)])
    next(batches)
    assert decoding_threads() > 0
    batches.close()
    assert decoding_threads() == 0


def test_an_error_surfaces_at_its_batch_and_ends_the_threads(shard):
    batches = loader(shard, prefetch_batches=3).stream([[0], [1], [-1], [2]])
    assert [next(batches).index_B.item() for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="index -1 is negative"):
        next(batches)
    assert decoding_threads() == 0


def test_an_error_of_the_index_source_surfaces_after_the_batches_before_it(shard):
    def failing():
        yield [0]
        yield [1]
        raise RuntimeError("the sampler broke")

    batches = loader(shard, prefetch_batches=3).stream(failing())
    assert [next(batches).index_B.item() for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="the sampler broke"):
        next(batches)


def test_an_empty_batch_of_indices_is_an_error_and_an_empty_stream_is_none(shard):
    assert list(loader(shard).stream([])) == []
    with pytest.raises(ValueError, match="empty batch of sample indices"):
        list(loader(shard).stream([[]]))


def test_an_error_of_on_bad_reaches_the_reader(damaged):
    def stop(report: BadSampleReport) -> None:
        raise RuntimeError(f"too many bad samples: {report.key}")

    with pytest.raises(RuntimeError, match="too many bad samples"):
        list(loader(damaged, pairs=(), mix_ratio=1.0, on_bad=stop).stream([[i] for i in range(7)]))
