"""WebDataset tar shards as one numbered set of samples.

A shard with an index (`iomm shard index`) opens at once, whatever its size; one without is scanned, header by
header. Both ways give the same samples under the same numbers. What the index adds: an image that failed its
test decode is refused unread, and one whose bytes changed since is noticed.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from iomm.data import stores
from iomm.data.captions import MAX_CAPTION_BYTES, caption_text, json_captions
from iomm.data.errors import BadSample
from iomm.data.hashing import cache_key
from iomm.data.index import Index
from iomm.data.staleness import refuse_stale
from iomm.data.stores import INDEX_SUFFIX, Reader
from iomm.data.tar_members import CAPTION_SUFFIX, IMAGE_SUFFIXES, SampleRef, scan

__all__ = ["SampleRef", "ShardSet"]

_OPEN_SHARDS = 128  # descriptors kept open; a process is usually allowed 1,024
_NOTICE_SAMPLES = 20_000  # from here on a scan takes long enough to speak of an index
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Scanned:
    """A shard without an index: all its samples, in memory."""

    samples: list[SampleRef]

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, j: int) -> SampleRef:
        return self.samples[j]


@dataclass(frozen=True, slots=True)
class _Indexed:
    """A shard of an open index; `captioned`: only its samples with a caption."""

    index: Index
    k: int
    captioned: bool

    def __len__(self) -> int:
        row = self.index.shards[self.k]
        return row.captioned if self.captioned else row.images

    def sample(self, j: int) -> SampleRef:
        return self.index.sample(self.k, j, captioned=self.captioned)


class ShardSet:
    """The samples of some shards, in shard order, then in the order of their images within a shard.

    Reads are safe from several threads. N is the number of samples.
    """

    def __init__(self, shards: Sequence[_Scanned | _Indexed]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)], dtype=np.int64)
        self._lock = threading.Lock()
        self._readers: OrderedDict[str, Reader] = OrderedDict()

    @classmethod
    def open(cls, patterns: Sequence[str], *, captioned_only: bool = False) -> Self:
        """Open every shard that `patterns` name: by its index if there is one beside it, else by a scan.

        Args:
            patterns: paths or globs of tar files, or of indexes, which stand for their shards; local, or
                addresses in an object store (`s3://...`). Each glob's shards are sorted by name.
            captioned_only: keep only the samples that have a caption.

        Raises:
            FileNotFoundError: a path or glob that names no file.
            ValueError: a shard named twice, not a tar, torn, with nested, linked or duplicated members; an
                index that is damaged or stale; or no sample left.
        """
        paths = stores.expand(patterns)
        indexes = stores.stamps([path + INDEX_SUFFIX for path in paths if not path.endswith(INDEX_SUFFIX)])
        shards: list[_Scanned | _Indexed] = []
        names: list[str] = []
        total = 0  # with and without a caption
        scanned: list[str] = []
        opened_indexes: list[Index] = []
        for path in paths:
            index_path = path if path.endswith(INDEX_SUFFIX) else path + INDEX_SUFFIX
            if index_path == path or index_path in indexes:
                index = Index.open(index_path)
                opened_indexes.append(index)
                shards += [_Indexed(index, k, captioned_only) for k in range(len(index.shards))]
                names += index.paths
                total += sum(row.images for row in index.shards)
            else:
                samples = scan(path)
                total += len(samples)
                scanned += [path] * bool(samples)
                kept = [s for s in samples if s.caption_offset is not None] if captioned_only else samples
                shards.append(_Scanned(kept))
                names.append(path)
        stores.refuse_twice(names, patterns)
        refuse_stale(opened_indexes)
        opened = cls(shards)
        if not len(opened):
            what = f"{total} images, none with a caption (KEY.{CAPTION_SUFFIX})" if total else "no image"
            raise ValueError(
                f"shards {', '.join(patterns)} hold {what}. "
                f"A sample is KEY.{'|'.join(IMAGE_SUFFIXES)}, with its caption in KEY.{CAPTION_SUFFIX}. "
                "Name other shards."
            )
        if scanned and total >= _NOTICE_SAMPLES:
            _suggest_index(" ".join(dict.fromkeys(stores.folder_of(path) or "." for path in scanned)))
        return opened

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> SampleRef:
        """Sample `i`; negative numbers count from the end.

        Raises:
            IndexError: there is no such sample.
            ValueError: the index is damaged there.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of a set of {len(self)}")
        i %= len(self)
        s = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shards[s].sample(i - int(self._starts[s]))

    @property
    def indexed(self) -> bool:
        """Whether every shard was opened by an index."""
        return all(isinstance(shard, _Indexed) for shard in self._shards)

    def size_px(self, i: int) -> tuple[int, int] | None:
        """Width and height of image `i`, upright; None without an index or with an unreadable header."""
        return self[i].size_px

    def verdict(self, i: int) -> str | None:
        """Why image `i` failed its test decode; None if it did not, or there is no index."""
        return self[i].reason

    def content_hash(self, i: int) -> str | None:
        """`cache_key` of image file `i`, without reading it; None without an index."""
        return self[i].content_hash

    def sizes_by_shard(self) -> Iterator[NDArray[np.int32]]:
        """Width and height of every image, upright, in pixels, (N, 2) of a shard at a time; 0 where unknown.

        Raises:
            ValueError: a shard has no index.
        """
        for shard in self._shards:
            yield _columns(shard, "width_px", "height_px")

    def good_N(self) -> NDArray[np.bool_]:
        """True where the image passed its test decode.

        Raises:
            ValueError: a shard has no index.
        """
        return np.concatenate([_columns(shard, "reason_bytes")[:, 0] == 0 for shard in self._shards])

    def image_bytes(self, i: int) -> bytes:
        """The image file of sample `i` as it lies in the shard.

        Raises:
            BadSample: by the index the image does not decode, or is not the one that was indexed.
            OSError: the shard cannot be read, or became shorter since it was opened.
        """
        return self.read_image(self[i])

    def read_image(self, ref: SampleRef) -> bytes:
        """`image_bytes` of a sample that was looked up. Raises as that does."""
        if ref.reason is not None:
            raise BadSample(ref.reason)
        data = self._read(ref.shard, ref.image_offset, ref.image_size)
        if ref.content_hash is not None and cache_key(data) != ref.content_hash:
            raise BadSample(
                "the image's bytes are not those that were indexed: the shard was damaged or changed since"
            )
        return data

    def caption(self, i: int) -> str | None:
        """The first caption of sample `i` without surrounding white space; None if the sample has none.

        Raises:
            BadSample: the caption is not UTF-8, or empty; or several are no JSON list of texts.
            OSError: as for `image_bytes`.
        """
        return next(iter(self.read_captions(self[i])), None)

    def read_captions(self, ref: SampleRef) -> tuple[str, ...]:
        """All captions of a sample that was looked up, as `caption` gives the first.

        Raises:
            BadSample, OSError: as for `caption`.
        """
        if ref.caption_offset is None or ref.caption_size is None:
            return ()
        if ref.caption_size > MAX_CAPTION_BYTES:
            raise BadSample(
                f"the caption has {ref.caption_size} bytes, more than the limit of {MAX_CAPTION_BYTES}"
            )
        data = self._read(ref.shard, ref.caption_offset, ref.caption_size)
        return json_captions(data) if ref.several_captions else (caption_text(data),)

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        with self._lock:
            reader = self._readers.get(shard) or stores.open_reader(shard)
            self._readers[shard] = reader
            self._readers.move_to_end(shard)
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader.read(offset, size)


def _columns(shard: _Scanned | _Indexed, *fields: str) -> NDArray[np.int32]:
    if isinstance(shard, _Scanned):
        where = f" ({shard.samples[0].shard})" if shard.samples else ""
        raise ValueError(
            f"a shard without an index{where}: the sizes of its images are not known. "
            "Make the index: iomm shard index TAR..."
        )
    return shard.index.column(shard.k, fields, captioned=shard.captioned).astype(np.int32)


@lru_cache
def _suggest_index(where: str) -> None:
    """Once a process: training and evaluation open the same shards."""
    _log.warning(
        "shards without an index were scanned header by header. With one they open at once, and damaged "
        "images are known beforehand. Make it: iomm shard index %s",
        where,
    )
