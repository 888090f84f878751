"""Global sample indices to decoded batches, in order, with prefetch, and with exact resume for free.

B = samples of a batch, C = 3 channels, H = W = data.image_px.

    index -> mixture: image or pair, and its position in that source
          -> epoch = position // n, sample = permute(position % n; seed, epoch)     (no list is held)
          -> read, decode

Nothing here depends on the rank, the number of threads or what was asked for before: `Loader.sample(index)`
is a function of the shards, the configuration and the seed. A run that resumes at step s asks for step s's
indices and has the same samples.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from iomm.config import DataConfig
from iomm.data.cache import cache_key
from iomm.data.decode import PillowDecoder
from iomm.data.decoder import Decoder, open_decoder
from iomm.data.errors import BadSample, BadSampleReport
from iomm.data.mixture import Kind, draw
from iomm.data.shards import ShardSet
from iomm.data.view import View
from iomm.random import permute

_PAIR_ORDER = 0x9E3779B9  # sets the order of pairs apart from that of images, which often are the same shards


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded sample."""

    index: int  # global sample index; in a held-out batch the position there
    key: str  # the sample key in its shard
    content_hash: str  # `cache_key` of the image file
    image_CHW: Tensor  # uint8
    caption: str | None  # None for an image-only sample, even if its shard has a caption


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples stacked, in the order of the indices asked for."""

    index_B: Tensor  # int64, on the CPU
    keys: tuple[str, ...]
    hashes: tuple[str, ...]
    image_BCHW: Tensor  # uint8; on the CPU, or where DALI decoded it
    captions: tuple[str | None, ...]

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of all its images."""
        height, width = self.image_BCHW.shape[2:]
        return height, width

    @staticmethod
    def stack(samples: Sequence[Sample]) -> "Batch":
        """A batch of at least one sample."""
        return Batch(
            index_B=torch.tensor([s.index for s in samples], dtype=torch.int64),
            keys=tuple(s.key for s in samples),
            hashes=tuple(s.content_hash for s in samples),
            image_BCHW=torch.stack([s.image_CHW for s in samples]),
            captions=tuple(s.caption for s in samples),
        )

    def take(self, rows: Sequence[int]) -> "Batch":
        """The samples at these positions of the batch, in their order."""
        return Batch(
            index_B=self.index_B[list(rows)],
            keys=tuple(self.keys[i] for i in rows),
            hashes=tuple(self.hashes[i] for i in rows),
            image_BCHW=self.image_BCHW[list(rows)],
            captions=tuple(self.captions[i] for i in rows),
        )


def global_batch_indices(
    step: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Global sample indices of one rank's micro-batches at one step.

    Step s covers [s * global_batch, (s + 1) * global_batch). Each micro-batch covers micro_batch * dp_size
    consecutive samples, of which rank r takes the r-th slice, so all ranks together see the same samples
    whatever the split.

    Raises:
        ValueError: global_batch is not divisible by micro_batch * dp_size, or a number is out of range.
    """
    if step < 0 or min(global_batch, micro_batch, dp_size) < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"step {step}, global batch {global_batch}, micro-batch {micro_batch}, data-parallel rank "
            f"{dp_rank} of {dp_size}: the step must not be negative, sizes must be at least 1, and "
            "the rank must lie in [0, dp_size)."
        )
    across = micro_batch * dp_size
    if global_batch % across:
        raise ValueError(
            f"global batch {global_batch} is not divisible by micro-batch * data-parallel size = "
            f"{micro_batch}*{dp_size} = {across}. "
            "Change train.global_batch_images or train.micro_batch_images, or launch another number of ranks."
        )
    starts = range(step * global_batch + dp_rank * micro_batch, (step + 1) * global_batch, across)
    return [list(range(start, start + micro_batch)) for start in starts]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A sample of a source, for a global index."""

    index: int
    source: ShardSet
    i: int  # in the source
    with_caption: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """A sample whose bytes a thread is waiting for."""

    shard: str
    key: str
    since: float  # time.monotonic()


class Loader:
    """Samples by global index. Safe to call from several threads."""

    def __init__(self, data: DataConfig, seed: int, *, on_bad: Callable[[BadSampleReport], None]) -> None:
        """Open the shards that the run will draw from, so that a missing one is said before training starts.

        Args:
            data: shards, mix ratio, image side, decoding threads.
            seed: of the order of samples.
            on_bad: told of each unreadable sample once. Called from decoding threads, one call at a time.

        Raises:
            FileNotFoundError, ValueError: as in `ShardSet.open`; or a setting out of range.
        """
        if data.decode_threads < 1:
            raise ValueError(f"data.decode_threads {data.decode_threads} must be at least 1.")
        if data.prefetch_batches < 0:
            raise ValueError(
                f"data.prefetch_batches {data.prefetch_batches} must not be negative; 0 means no prefetch."
            )
        self._data = data
        self._decoder = open_decoder(data)
        self._view = View(data.image_px, data.image_px)
        self._seed = seed
        self._on_bad = on_bad
        self._sources: dict[Kind, ShardSet] = {}
        if data.mix_ratio > 0:
            self._sources["image"] = ShardSet.open(data.images)
        if data.mix_ratio < 1:
            self._sources["pair"] = ShardSet.open(data.pairs, captioned_only=True)
        self._heldout = ShardSet.open(data.heldout, captioned_only=True) if data.heldout else None
        # By source: a sample whose caption is bad is no pair, and still a good image wherever it is one.
        self._unreadable: set[tuple[ShardSet, int]] = set()
        self._reported: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._readings: dict[int, Reading] = {}  # by thread

    @property
    def readings(self) -> list[Reading]:
        """What threads are reading at this moment; any thread may ask."""
        return list(self._readings.values())

    def size(self, kind: Kind) -> int:
        """Samples in one epoch of a source; 0 if the mix ratio never draws from it."""
        return len(self._sources[kind]) if kind in self._sources else 0

    def size_px(self, index: int) -> tuple[int, int]:
        """(height, width) of the training image of a global index, in closed form: nothing is read."""
        return self._view.height_px, self._view.width_px

    @property
    def heldout_size(self) -> int:
        """Captioned held-out samples, readable or not."""
        return len(self._heldout) if self._heldout else 0

    def sample(self, index: int) -> Sample:
        """The sample of a global index: a pure function.

        An unreadable sample is reported and replaced by the next one in its epoch's order.

        Raises:
            ValueError: a negative index, or no readable image in the whole source.
        """
        return self.samples([index])[0]

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of global indices, as `sample` gives them, decoded together."""
        found: dict[int, Sample] = {}  # by position in `indices`
        attempt = 0
        while len(found) < len(indices):
            left = [place for place in range(len(indices)) if place not in found]
            read = self._read([self._want(indices[place], attempt) for place in left], self._decoder)
            found |= {place: sample for place, sample in zip(left, read, strict=True) if sample is not None}
            attempt += 1
        return [found[place] for place in range(len(indices))]

    def _want(self, index: int, attempt: int) -> _Wanted:
        """What stands for a global index after `attempt` unreadable samples.

        Raises:
            ValueError: as in `sample`.
        """
        kind, position = draw(index, self._data.mix_ratio)
        source = self._sources[kind]
        if attempt == len(source):
            patterns = self._data.images if kind == "image" else self._data.pairs
            raise ValueError(
                f"no readable image among the {len(source)} samples of {', '.join(patterns)}. "
                "Each one's reason was reported. Check that the shards hold JPEG, PNG or WebP files."
            )
        epoch, place = divmod(position, len(source))
        seed = self._seed if kind == "image" else self._seed ^ _PAIR_ORDER
        i = permute((place + attempt) % len(source), len(source), seed, epoch)
        return _Wanted(index, source, i, kind == "pair")

    def stream(self, index_batches: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Batches of the given global sample indices, in order, decoded ahead by threads.

        There are `data.decode_threads` of them. At most `data.prefetch_batches` batches are decoded beyond
        the one in hand. An error is raised where its batch would have come. Closing the
        iterator ends the threads.
        """
        ahead = self._data.prefetch_batches + 1
        batches = iter(index_batches)
        pending: deque[list[Future[list[Sample]]]] = deque()
        pool = ThreadPoolExecutor(self._data.decode_threads, thread_name_prefix="iomm-decode")
        try:
            more = True
            while True:
                while more and len(pending) < ahead:
                    futures, more = self._submit_next(pool, batches)
                    if futures:
                        pending.append(futures)
                if not pending:
                    return
                yield Batch.stack([sample for part in pending.popleft() for sample in part.result()])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def heldout(self, n: int) -> Batch:
        """The first n readable held-out samples in shard order, with captions. `index_B` is 0 ... n - 1.

        Raises:
            ValueError: `data.heldout` is empty or has fewer readable captioned samples than n; or n < 1.
        """
        if n < 1:
            raise ValueError(f"{n} held-out samples were asked for; at least 1 is needed.")
        reference = PillowDecoder(self._data.max_image_pixels)
        samples: list[Sample] = []
        for i in range(self.heldout_size):
            if len(samples) == n:
                break
            assert self._heldout is not None
            samples += filter(None, self._read([_Wanted(len(samples), self._heldout, i, True)], reference))
        if len(samples) < n:
            raise ValueError(
                f"data.heldout {list(self._data.heldout)} has {len(samples)} readable captioned samples, "
                f"fewer than the {n} asked for. Lower train.eval_images or name more shards."
            )
        return Batch.stack(samples)

    def _submit_next(
        self, pool: ThreadPoolExecutor, batches: Iterator[Sequence[int]]
    ) -> tuple[list[Future[list[Sample]]], bool]:
        """Futures of the next batch's samples, in parts, and whether more batches may follow.

        What `batches` itself raises becomes a failed future: the batches before it are handed out first.
        """
        try:
            indices = next(batches, None)
        except Exception as error:
            failed: Future[list[Sample]] = Future()
            failed.set_exception(error)
            return [failed], False
        if indices is None:
            return [], False
        if not len(indices):
            failed = Future()
            failed.set_exception(
                ValueError("an empty batch of sample indices was given; a batch has at least one.")
            )
            return [failed], False
        whole = [int(index) for index in indices]
        parts = [whole] if self._decoder.whole_batches else [[index] for index in whole]
        return [pool.submit(self.samples, part) for part in parts], True

    def _read(self, wanted: Sequence[_Wanted], decoder: Decoder) -> list[Sample | None]:
        """Samples, decoded together. None for an unreadable one, reported the first time."""
        read = [self._bytes(want) for want in wanted]
        files = [found[0] for found in read if found is not None]
        images = iter(decoder.decode(files, [self._view] * len(files)))
        samples: list[Sample | None] = []
        for want, found in zip(wanted, read, strict=True):
            image_CHW = None if found is None else next(images)
            if isinstance(image_CHW, BadSample):
                self._reject(want, image_CHW)
            if found is None or not isinstance(image_CHW, Tensor):
                samples.append(None)
                continue
            data, caption = found
            ref = want.source[want.i]
            # An index has the hash, and the bytes were held against it when they were read.
            content_hash = ref.content_hash or cache_key(data)
            samples.append(Sample(want.index, ref.key, content_hash, image_CHW, caption))
        return samples

    def _bytes(self, want: _Wanted) -> tuple[bytes, str | None] | None:
        """A sample's image file and caption. None if it is unreadable, reported the first time."""
        if (want.source, want.i) in self._unreadable:
            return None
        ref = want.source[want.i]
        size, limit = ref.image_size, self._data.max_image_bytes
        self._readings[threading.get_ident()] = Reading(ref.shard, ref.key, time.monotonic())
        try:
            if size > limit:
                raise BadSample(f"a file of {size} bytes, more than the limit of {limit} bytes")
            caption = want.source.caption(want.i) if want.with_caption else None
            return want.source.image_bytes(want.i), caption
        except BadSample as error:
            self._reject(want, error)
            return None
        finally:
            del self._readings[threading.get_ident()]

    def _reject(self, want: _Wanted, error: BadSample) -> None:
        self._unreadable.add((want.source, want.i))
        ref = want.source[want.i]
        self._report(BadSampleReport(ref.shard, ref.key, error.reason))

    def _report(self, bad: BadSampleReport) -> None:
        with self._lock:
            if (bad.shard, bad.key) not in self._reported:
                self._reported.add((bad.shard, bad.key))
                self._on_bad(bad)
