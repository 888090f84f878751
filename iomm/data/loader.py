"""Global sample indices to decoded batches, in order, with prefetch, and with exact resume for free.

    index -> the schedule: which image, what of it, which caption
          -> read, decode; an image that cannot be used is replaced by the next one of its order

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

from torch import Tensor

from iomm.config import DataConfig
from iomm.data.batch import Batch, Sample, global_batch_indices
from iomm.data.cache import cache_key
from iomm.data.decode import PillowDecoder
from iomm.data.decoder import Decoder, open_decoder
from iomm.data.errors import BadSample, BadSampleReport
from iomm.data.mixture import Kind
from iomm.data.schedule import Schedule
from iomm.data.shards import SampleRef, ShardSet
from iomm.data.view import View

__all__ = ["Batch", "Loader", "Sample", "global_batch_indices"]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A sample of a source, for a global index."""

    index: int
    source: ShardSet
    i: int  # in the source
    view: View
    with_caption: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """A sample whose bytes a thread is waiting for."""

    shard: str
    key: str
    since: float  # time.monotonic()


class Loader:
    """Samples by global index. Safe to call from several threads."""

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        *,
        on_bad: Callable[[BadSampleReport], None],
        global_batch_images: int | None = None,
        token_px: int | None = None,
        tokenize: Callable[[str], object] | None = None,
    ) -> None:
        """Open the shards that the run will draw from, so that a missing one is said before training starts.

        Args:
            data: shards, mix ratio, image side, decoding threads.
            seed: of the order of samples, of crops, flips and the choice of captions.
            on_bad: told of each unreadable sample once. Called from decoding threads, one call at a time.
            global_batch_images: samples of a step; needed for a progression, and the default block of
                buckets.
            token_px: pixels a side of a latent token; needed for buckets.
            tokenize: raises ValueError for a caption that the MLLM does not take. With
                data.long_captions=skip such a pair is a bad sample.

        Raises:
            FileNotFoundError, ValueError: as in `ShardSet.open` and `Schedule`; or a setting out of range.
        """
        if data.decode_threads < 1:
            raise ValueError(f"data.decode_threads {data.decode_threads} must be at least 1.")
        if data.prefetch_batches < 0:
            raise ValueError(
                f"data.prefetch_batches {data.prefetch_batches} must not be negative; 0 means no prefetch."
            )
        self._data = data
        self._decoder = open_decoder(data)
        self._on_bad = on_bad
        self._tokenize = tokenize if data.long_captions == "skip" else None
        self._sources: dict[Kind, ShardSet] = {}
        if data.mix_ratio > 0:
            self._sources["image"] = ShardSet.open(data.images)
        if data.mix_ratio < 1:
            self._sources["pair"] = ShardSet.open(data.pairs, captioned_only=True)
        self._heldout = ShardSet.open(data.heldout, captioned_only=True) if data.heldout else None
        self._schedule = Schedule(
            data, seed, self._sources, global_batch_images=global_batch_images, token_px=token_px
        )
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
        return self._schedule.size_px(index)

    @property
    def sizes_px(self) -> list[tuple[int, int]]:
        """Every (height, width) that the run may come to, each once."""
        return self._schedule.sizes_px

    def check_micro_batch(self, images: int) -> None:
        """That all images of a micro-batch over all ranks have one size.

        Raises:
            ValueError: `images`, of one micro-batch over all data-parallel ranks, does not divide the block
                of a bucket.
        """
        self._schedule.check_micro_batch(images)

    @property
    def bad_samples(self) -> int:
        """How many samples were found that cannot be used; each one was reported."""
        return len(self._reported)

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

    def numbered(self, kind: Kind, numbers: Sequence[int]) -> list[Sample | None]:
        """Samples by their number in a source, as training shows them in the end, but neither cropped at
        random nor flipped; `index` is the number. None for an unreadable one, reported the first time."""
        source, view = self._sources[kind], self._schedule.plain_view
        wanted = [_Wanted(i, source, i, view(kind, i), kind == "pair") for i in numbers]
        return self._read(wanted, self._decoder)

    def shown(self, kind: Kind, number: int) -> tuple[str, View] | None:
        """Content hash and view of what `numbered` gives, without reading it; None without an index."""
        content_hash = self._sources[kind].content_hash(number)
        return None if content_hash is None else (content_hash, self._schedule.plain_view(kind, number))

    def _want(self, index: int, attempt: int) -> _Wanted:
        """What stands for a global index after `attempt` unreadable samples.

        Raises:
            ValueError: as in `sample`.
        """
        slot = self._schedule.slot(index)
        images = self._schedule.images(slot)
        if attempt == images:
            patterns = self._data.images if slot.kind == "image" else self._data.pairs
            raise ValueError(
                f"no readable image among the {images} samples of {', '.join(patterns)}. "
                "Each one's reason was reported. Check that the shards hold JPEG, PNG or WebP files."
            )
        i = self._schedule.number(slot, attempt)
        return _Wanted(
            index, self._sources[slot.kind], i, self._schedule.view(index), with_caption=slot.kind == "pair"
        )

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
        view = View(self._data.image_px, self._data.image_px)
        samples: list[Sample] = []
        for i in range(self.heldout_size):
            if len(samples) == n:
                break
            assert self._heldout is not None
            want = _Wanted(len(samples), self._heldout, i, view, with_caption=True)
            samples += filter(None, self._read([want], reference))
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
        read = [self._files(want) for want in wanted]
        files = [(found[1], want.view) for found, want in zip(read, wanted, strict=True) if found is not None]
        images = iter(decoder.decode([data for data, _ in files], [view for _, view in files]))
        samples: list[Sample | None] = []
        for want, found in zip(wanted, read, strict=True):
            if found is None:
                samples.append(None)
                continue
            (ref, data, caption), image_CHW = found, next(images)
            if not isinstance(image_CHW, Tensor):
                self._reject(want, ref, image_CHW)
                samples.append(None)
                continue
            # An index has the hash, and the bytes were held against it when they were read.
            content_hash = ref.content_hash or cache_key(data)
            samples.append(Sample(want.index, ref.key, content_hash, want.view, image_CHW, caption))
        return samples

    def _files(self, want: _Wanted) -> tuple[SampleRef, bytes, str | None] | None:
        """A sample's image file and caption. None if it is unreadable, reported the first time."""
        if (want.source, want.i) in self._unreadable:
            return None
        ref, limit = want.source[want.i], self._data.max_image_bytes
        self._readings[threading.get_ident()] = Reading(ref.shard, ref.key, time.monotonic())
        try:
            if ref.image_size > limit:
                raise BadSample(f"a file of {ref.image_size} bytes, more than the limit of {limit} bytes")
            caption = self._caption(want, ref) if want.with_caption else None
            return ref, want.source.read_image(ref), caption
        except BadSample as error:
            self._reject(want, ref, error)
            return None
        finally:
            del self._readings[threading.get_ident()]

    def _caption(self, want: _Wanted, ref: SampleRef) -> str | None:
        """The caption used at this index.

        Raises:
            BadSample: there is none that can be used.
        """
        caption = want.source.read_caption(ref)
        if caption is not None and self._tokenize is not None:
            try:
                with self._lock:  # tokenizers change settings of theirs in a call
                    self._tokenize(caption)
            except ValueError as error:
                raise BadSample(f"the caption is not one for the MLLM: {error}") from error
        return caption

    def _reject(self, want: _Wanted, ref: SampleRef, error: BadSample) -> None:
        with self._lock:
            self._unreadable.add((want.source, want.i))
            if (ref.shard, ref.key) not in self._reported:
                self._reported.add((ref.shard, ref.key))
                self._on_bad(BadSampleReport(ref.shard, ref.key, error.reason))
