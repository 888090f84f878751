"""Global sample indices to decoded batches, in order, with prefetch, and with exact resume for free.

    index -> the schedule: which image, what of it, which caption
          -> read, decode; an image that cannot be used is replaced by the next one of its order

Nothing here depends on the rank, the number of threads or what was asked for before: `Loader.sample(index)`
is a function of the shards, the configuration and the seed. A run that resumes at step s asks for step s's
indices and has the same samples.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

from torch import Tensor

from iomm.config import Config, DataConfig
from iomm.data.batch import Batch, Sample, global_batch_indices
from iomm.data.batch_memory import BatchMemory
from iomm.data.decode import PillowDecoder
from iomm.data.decoder import open_decoder
from iomm.data.errors import BadSampleReport
from iomm.data.mixture import Kind
from iomm.data.reader import Reading, SampleReader, Wanted, first_caption
from iomm.data.schedule import Schedule
from iomm.data.shards import ShardSet
from iomm.data.view import View

__all__ = ["Batch", "Loader", "Reading", "Sample", "global_batch_indices"]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A batch in the making: its samples in parts, and where their images are put together, if at once."""

    parts: list[Future[list[Sample]]]
    image_BCHW: Tensor | None = None


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
        on_sample: Callable[[Sample], None] | None = None,
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
            on_sample: told of each sample of a global index when it is ready. Called from decoding threads.

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
        self._memory = BatchMemory(data.prefetch_batches + 3)  # and two in the hands of who trains on them
        self._on_sample = on_sample
        self._reader = SampleReader(data, tokenize if data.long_captions == "skip" else None, on_bad)
        self._sources: dict[Kind, ShardSet] = {}
        if data.mix_ratio > 0:
            self._sources["image"] = ShardSet.open(data.images)
        if data.mix_ratio < 1:
            self._sources["pair"] = ShardSet.open(data.pairs, captioned_only=True)
        self._heldout = ShardSet.open(data.heldout, captioned_only=True) if data.heldout else None
        self._schedule = Schedule(
            data, seed, self._sources, global_batch_images=global_batch_images, token_px=token_px
        )

    @classmethod
    def of_run(
        cls,
        config: Config,
        *,
        on_bad: Callable[[BadSampleReport], None],
        token_px: int,
        tokenize: Callable[[str], object] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
    ) -> Self:
        """The loader that a training run has. Arguments and errors as the constructor's."""
        train = config.train
        return cls(
            config.data,
            train.seed,
            on_bad=on_bad,
            global_batch_images=train.global_batch_images,
            token_px=token_px,
            tokenize=tokenize,
            on_sample=on_sample,
        )

    @property
    def readings(self) -> list[Reading]:
        """What threads are reading at this moment; any thread may ask."""
        return self._reader.readings

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
    def rescued(self) -> int:
        """Calls of the decoder that failed and were decoded another way."""
        return self._decoder.rescued

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

    def samples(self, indices: Sequence[int], into: Tensor | None = None) -> list[Sample]:
        """The samples of global indices, as `sample` gives them, decoded together.

        Args:
            indices: global sample indices.
            into: uint8 (len(indices), 3, H, W) on the CPU: the images are put there.
        """
        found: dict[int, Sample] = {}  # by position in `indices`
        slots = None if into is None else list(into)
        attempt = 0
        while len(found) < len(indices):
            left = [place for place in range(len(indices)) if place not in found]
            wanted = [self._want(indices[place], attempt) for place in left]
            read = self._reader.read(wanted, self._decoder, slots and [slots[place] for place in left])
            found |= {place: sample for place, sample in zip(left, read, strict=True) if sample is not None}
            attempt += 1
        samples = [found[place] for place in range(len(indices))]
        for slot, sample in zip(slots or (), samples, strict=False):
            if sample.image_CHW is not slot:
                # NumPy's copy: torch would start threads for it, beside the decoding ones.
                slot.numpy()[:] = sample.image_CHW.numpy()
        if self._on_sample is not None:
            for sample in samples:
                self._on_sample(sample)
        return samples

    def numbered(self, kind: Kind, numbers: Sequence[int]) -> list[Sample | None]:
        """Samples by their number in a source, as training shows them in the end, but neither cropped at
        random nor flipped; `index` is the number. None for an unreadable one, reported the first time."""
        source, view = self._sources[kind], self._schedule.plain_view
        wanted = [
            Wanted(i, source, i, view(kind, i), first_caption if kind == "pair" else None) for i in numbers
        ]
        return self._reader.read(wanted, self._decoder)

    def shown(self, kind: Kind, number: int) -> tuple[str, View] | None:
        """Content hash and view of what `numbered` gives, without reading it; None without an index."""
        content_hash = self._sources[kind].content_hash(number)
        return None if content_hash is None else (content_hash, self._schedule.plain_view(kind, number))

    def _want(self, index: int, attempt: int) -> Wanted:
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
        pick = partial(self._schedule.caption, index) if slot.kind == "pair" else None
        return Wanted(index, self._sources[slot.kind], i, self._schedule.view(index), pick)

    def stream(self, index_batches: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Batches of the given global sample indices, in order, decoded ahead by threads.

        There are `data.decode_threads` of them. At most `data.prefetch_batches` batches are decoded beyond
        the one in hand. An error is raised where its batch would have come. Closing the
        iterator ends the threads.
        """
        ahead = self._data.prefetch_batches + 1
        batches = iter(index_batches)
        pending: deque[_Ahead] = deque()
        pool = ThreadPoolExecutor(self._data.decode_threads, thread_name_prefix="iomm-decode")
        try:
            more = True
            while True:
                while more and len(pending) < ahead:
                    batch, more = self._submit_next(pool, batches)
                    if batch is not None:
                        pending.append(batch)
                if not pending:
                    return
                batch = pending.popleft()
                yield Batch.stack(
                    [sample for part in batch.parts for sample in part.result()], batch.image_BCHW
                )
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
            want = Wanted(len(samples), self._heldout, i, view, first_caption)
            samples += filter(None, self._reader.read([want], reference))
        if len(samples) < n:
            raise ValueError(
                f"data.heldout {list(self._data.heldout)} has {len(samples)} readable captioned samples, "
                f"fewer than the {n} asked for. Lower train.eval_images or name more shards."
            )
        return Batch.stack(samples)

    def _submit_next(
        self, pool: ThreadPoolExecutor, batches: Iterator[Sequence[int]]
    ) -> tuple["_Ahead | None", bool]:
        """The next batch in the making, and whether more batches may follow.

        What `batches` itself raises becomes a failed future: the batches before it are handed out first.
        """
        try:
            indices = next(batches, None)
            if indices is None:
                return None, False
            if not len(indices):
                raise ValueError("an empty batch of sample indices was given; a batch has at least one.")
            whole = [int(index) for index in indices]
            sizes = {self.size_px(index) for index in whole}
        except Exception as error:
            failed: Future[list[Sample]] = Future()
            failed.set_exception(error)
            return _Ahead([failed]), False
        if self._decoder.whole_batches or len(sizes) > 1:
            return _Ahead([pool.submit(self.samples, whole)]), True
        image_BCHW = self._memory.empty((len(whole), 3, *sizes.pop()))
        parts = [pool.submit(self.samples, [i], image_BCHW[b : b + 1]) for b, i in enumerate(whole)]
        return _Ahead(parts, image_BCHW), True
