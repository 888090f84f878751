"""From places in shards to decoded samples: read, check, decode, choose a caption, say what cannot be used.

C = 3 channels, H x W pixels.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from iomm.config import DataConfig
from iomm.data.batch import Sample
from iomm.data.decoder import Decoder
from iomm.data.errors import BadSample, BadSampleReport
from iomm.data.hashing import cache_key
from iomm.data.shards import SampleRef, ShardSet
from iomm.data.view import View


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sample of a source, for a global index."""

    index: int
    source: ShardSet
    i: int  # in the source
    view: View
    pick: Callable[[int], int] | None  # which of several captions; None: an image without one


@dataclass(frozen=True, slots=True)
class Reading:
    """A sample whose bytes a thread is waiting for."""

    shard: str
    key: str
    since: float  # time.monotonic()


class SampleReader:
    """Reads and decodes samples. Safe to call from several threads.

    A sample is judged anew each time: what is wrong with it may depend on what of it is asked for, and must
    not depend on what was asked for before.

    Args:
        data: limits.
        tokenize: raises ValueError for a caption that cannot be used; None: all can.
        on_bad: told of each bad sample once, one call at a time.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenize: Callable[[str], object] | None,
        on_bad: Callable[[BadSampleReport], None],
    ) -> None:
        self._max_image_bytes = data.max_image_bytes
        self._tokenize = tokenize
        self._on_bad = on_bad
        self._reported: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._readings: dict[int, Reading] = {}  # by thread

    @property
    def readings(self) -> list[Reading]:
        """What threads are reading at this moment; any thread may ask."""
        return list(self._readings.values())

    def read(
        self, wanted: Sequence[Wanted], decoder: Decoder, into: Sequence[Tensor] | None = None
    ) -> list[Sample | None]:
        """Samples, decoded together, into these tensors if it can be. None for an unreadable one, reported
        the first time."""
        read = [self._files(want) for want in wanted]
        there = [place for place, found in enumerate(read) if found is not None]
        files = [found[1] for found in read if found is not None]
        slots = None if into is None else [into[place] for place in there]
        images = iter(decoder.decode(files, [wanted[place].view for place in there], slots))
        samples: list[Sample | None] = []
        for want, found in zip(wanted, read, strict=True):
            if found is None:
                samples.append(None)
                continue
            (ref, data, caption), image_CHW = found, next(images)
            if not isinstance(image_CHW, Tensor):
                self._reject(ref, image_CHW)
                samples.append(None)
                continue
            # An index has the hash, and the bytes were held against it when they were read.
            content_hash = ref.content_hash or cache_key(data)
            samples.append(Sample(want.index, ref.key, content_hash, want.view, image_CHW, caption))
        return samples

    def _files(self, want: Wanted) -> tuple[SampleRef, bytes, str | None] | None:
        """A sample's image file and caption. None if it is unreadable, reported the first time."""
        ref, limit = want.source[want.i], self._max_image_bytes
        self._readings[threading.get_ident()] = Reading(ref.shard, ref.key, time.monotonic())
        try:
            if ref.reason is not None:
                raise BadSample(ref.reason)
            if ref.image_size > limit:
                raise BadSample(f"a file of {ref.image_size} bytes, more than the limit of {limit} bytes")
            caption = self._caption(want.source, ref, want.pick) if want.pick is not None else None
            return ref, want.source.read_image(ref), caption
        except BadSample as error:
            self._reject(ref, error)
            return None
        finally:
            del self._readings[threading.get_ident()]

    def _caption(self, source: ShardSet, ref: SampleRef, pick: Callable[[int], int]) -> str:
        """One of the captions that the MLLM takes.

        Raises:
            BadSample: there is none.
        """
        captions, refusal = source.read_captions(ref), "it has none"
        if self._tokenize is not None:
            kept: list[str] = []
            for caption in captions:
                try:
                    with self._lock:  # tokenizers change settings of theirs in a call
                        self._tokenize(caption)
                    kept.append(caption)
                except ValueError as error:
                    refusal = str(error)
            captions = kept
        if not captions:
            raise BadSample(f"no caption for the MLLM: {refusal}")
        return captions[pick(len(captions))]

    def _reject(self, ref: SampleRef, error: BadSample) -> None:
        with self._lock:
            if (ref.shard, ref.key) not in self._reported:
                self._reported.add((ref.shard, ref.key))
                self._on_bad(BadSampleReport(ref.shard, ref.key, error.reason))


def first_caption(_captions: int) -> int:
    """The choice where nothing is drawn."""
    return 0
