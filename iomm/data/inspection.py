"""The full test decode of images before any training: size, content hash, and whether they can be used.

Work is dealt to processes and comes back in the order it was given, so what is made of it does not depend on
their number. A decoder that kills its process takes one image with it, not the run.
"""

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial

from iomm.config import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from iomm.data import stores
from iomm.data.captions import MAX_CAPTION_BYTES, caption_text, json_captions
from iomm.data.decode_cpu import CpuDecoder
from iomm.data.decode_header import probe
from iomm.data.errors import BadSample
from iomm.data.hashing import cache_key
from iomm.data.tar_members import SampleRef
from iomm.data.view import View

_BATCH_IMAGES = 16
_BATCH_BYTES = 32 << 20
_AHEAD = 3  # batches a process


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before it costs memory or time."""

    max_pixels: int = MAX_IMAGE_PIXELS
    max_image_bytes: int = MAX_IMAGE_BYTES
    max_caption_bytes: int = MAX_CAPTION_BYTES
    max_members: int = 2_000_000  # of one tar


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file on this machine."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Item:
    """An image to look at, with its caption."""

    name: str  # where it comes from, for messages
    key: str  # wanted; not yet unique, flat or short
    image: Place | bytes
    caption: Place | bytes | None = None
    caption_field: str | None = None  # of a JSON caption; None: the caption is plain text
    known: SampleRef | None = None  # by an index: not decoded again while its bytes are the same


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something in a source that is no usable sample."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was found out about an item."""

    item: Item
    content_hash: str = ""  # empty where the image could not be read
    size_px: tuple[int, int] | None = None  # width, height, upright
    suffix: str = ""  # by the file's content, not by its name
    reason: str | None = None  # why the image cannot be used
    data: bytes = b""  # the image file, if it was asked for
    captions: tuple[str, ...] = ()
    caption_reason: str | None = None  # why the captions cannot be used


def inspect(items: Sequence[Item], limits: Limits, keep_data: bool) -> list[Inspected]:
    """Read, hash and test-decode images. Nothing that is wrong with one is raised."""
    decoder = CpuDecoder(limits.max_pixels)
    return [_inspect(item, limits, keep_data, decoder) for item in items]


def _inspect(item: Item, limits: Limits, keep_data: bool, decoder: CpuDecoder) -> Inspected:
    found = Inspected(item)
    try:
        data = _bytes_of(item.image, limits.max_image_bytes, "the image")
        found = replace(found, content_hash=cache_key(data), data=data if keep_data else b"")
        if item.known is not None and item.known.content_hash == found.content_hash:
            return replace(found, size_px=item.known.size_px, reason=item.known.reason)
        header = probe(data, max_pixels=limits.max_pixels)
        width, height = header.upright_size_px
        suffix = "jpg" if header.format == "jpeg" else header.format
        found = replace(found, size_px=(width, height), suffix=suffix)
        decoded = decoder.decode([data], [View(width, height)])[0]
        if isinstance(decoded, BadSample):
            raise decoded
    except BadSample as error:
        return replace(found, reason=error.reason, data=b"")
    try:
        return replace(found, captions=_captions_of(item, limits))
    except BadSample as error:
        return replace(found, caption_reason=error.reason)


def _bytes_of(source: Place | bytes, limit: int, what: str) -> bytes:
    size = source.size if isinstance(source, Place) else len(source)
    if size > limit:
        raise BadSample(f"{what} has {size} bytes, more than the limit of {limit}")
    if isinstance(source, bytes):
        return source
    try:
        return stores.open_reader(source.path).read(source.offset, source.size)
    except OSError as error:
        raise BadSample(f"{what} cannot be read: {error}") from error


def _captions_of(item: Item, limits: Limits) -> tuple[str, ...]:
    if item.caption is None:
        return ()
    data = _bytes_of(item.caption, limits.max_caption_bytes, "the caption")
    if item.caption_field is None:
        return (caption_text(data),)
    return json_captions(data, item.caption_field)


def inspect_all(
    items: Iterable[Item | Rejected], limits: Limits, *, processes: int, keep_data: bool
) -> Generator[Inspected | Rejected]:
    """Inspect items on several processes; results in the order of the items, what was rejected among them.

    Args:
        processes: 1 or less works in this process.
        keep_data: whether the image files come back with the results.
    """
    work = partial(inspect, limits=limits, keep_data=keep_data)
    if processes <= 1:
        for batch in _batches(items):
            yield from _merge(batch, work([item for item in batch if isinstance(item, Item)]))
        return
    # Not forked: torch's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    pending: deque[tuple[list[Item | Rejected], Future[list[Inspected]]]] = deque()
    batches = _batches(items)
    try:
        while True:
            while len(pending) < _AHEAD * processes and (batch := next(batches, None)) is not None:
                pending.append((batch, _submit(pool, work, batch)))
            if not pending:
                return
            batch, future = pending.popleft()
            try:
                found = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=True, cancel_futures=True)
                found = _one_by_one(batch, work)
                pool = ProcessPoolExecutor(processes, mp_context=context)
                pending = deque((batch, _submit(pool, work, batch)) for batch, _ in pending)
            yield from _merge(batch, found)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, work: "partial[list[Inspected]]", batch: Sequence[Item | Rejected]
) -> Future[list[Inspected]]:
    try:
        return pool.submit(work, [item for item in batch if isinstance(item, Item)])
    except BrokenProcessPool as error:  # broken by a batch before this one, which is found out at its turn
        failed: Future[list[Inspected]] = Future()
        failed.set_exception(error)
        return failed


def _one_by_one(batch: Sequence[Item | Rejected], work: "partial[list[Inspected]]") -> list[Inspected]:
    """Each item alone in a process, which is replaced after the item that kills it."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context)
    found: list[Inspected] = []
    for item in batch:
        if isinstance(item, Item):
            try:
                found += pool.submit(work, [item]).result()
            except BrokenProcessPool:
                found.append(Inspected(item, reason="decoding it killed the process"))
                pool.shutdown()
                pool = ProcessPoolExecutor(1, mp_context=context)
    pool.shutdown()
    return found


def _merge(batch: Sequence[Item | Rejected], found: Sequence[Inspected]) -> Iterator[Inspected | Rejected]:
    results = iter(found)
    for item in batch:
        yield item if isinstance(item, Rejected) else next(results)


def _batches(items: Iterable[Item | Rejected]) -> Iterator[list[Item | Rejected]]:
    batch: list[Item | Rejected] = []
    size = 0
    for item in items:
        batch.append(item)
        if isinstance(item, Item):
            size += item.image.size if isinstance(item.image, Place) else len(item.image)
        if len(batch) >= _BATCH_IMAGES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
