"""The index of shards: what is known of each sample, without reading the shard.

    magic and version
    shard by shard:  records    `RECORD`, 64 bytes a sample                                   (N,)
                     captioned  numbers of the records with a caption, uint32                 (M,)
                     text       keys, each followed by the reason why its image cannot be used, UTF-8
    footer           JSON: the shards with their sizes, times, counts and CRC-32s
    trailer          length and CRC-32 of the footer, magic

The index of one shard (SHARD.tar.index) and that of a data set (set.index) are the same file with one shard
and with many. Opening reads the footer, O(shards); records are read one at a time, as they are used, and not
mapped: a file that shrinks under a map would kill the process. Each record carries a CRC-32 of itself and its
text, compared when it is used, so that damage is found without reading the whole.

N samples, M of them with a caption, in one shard.
"""

import io
import json
import os
import shutil
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from iomm.data import stores
from iomm.data.stores import INDEX_SUFFIX, Reader, Stamp
from iomm.data.tar_members import SampleRef

MAGIC = b"IOMM-IDX"
VERSION = 1
_HEAD = struct.Struct("<8sI")
_TRAILER = struct.Struct("<II8s")
_OPEN_INDEXES = 128  # descriptors kept open; a process is usually allowed 1,024
_CHUNK = 1 << 18  # records read at once where a whole column is wanted
RECORD = np.dtype(
    [
        ("image_offset", "<u8"),
        ("caption_offset", "<u8"),  # 0: no caption (a tar begins with a header); `_SEVERAL` added: a list
        ("text_offset", "<u8"),  # from the start of the shard's text
        ("content_hash", "V16"),
        ("image_size", "<u4"),
        ("caption_size", "<u4"),
        ("width_px", "<u4"),  # upright; 0: unknown, the image's header is unreadable
        ("height_px", "<u4"),
        ("crc32", "<u4"),  # of the 60 other bytes of the record and its text
        ("key_bytes", "<u2"),
        ("reason_bytes", "<u2"),  # 0: the image decodes
    ]
)
assert RECORD.itemsize == 64
_SEVERAL = 1 << 63
_MAX_REASON = 500  # characters
Records = NDArray[np.void]


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard, in memory."""

    name: str  # path of the shard, seen from the index file's folder
    stamp: Stamp
    records_N: Records
    captioned_M: NDArray[np.uint32]
    text: NDArray[np.uint8]

    @classmethod
    def build(cls, name: str, stamp: Stamp, samples: Sequence[SampleRef]) -> Self:
        """From samples whose content hash is known, in the order of the shard.

        Raises:
            ValueError: a member of 4 GiB or more, or a key of 64 KiB or more.
        """
        records_N = np.zeros(len(samples), RECORD)
        text = bytearray()
        for i, sample in enumerate(samples):
            assert sample.content_hash is not None
            if max(sample.image_size, sample.caption_size or 0) >= 1 << 32:
                raise ValueError(
                    f"{name}: a member of sample {sample.key!r} has 4 GiB or more. Leave it out."
                )
            key = sample.key.encode("utf-8", "surrogateescape")
            if len(key) >= 1 << 16:
                raise ValueError(
                    f"{name}: key {sample.key[:80]!r}... has {len(key)} bytes, the limit is 65535."
                )
            reason = (sample.reason or "")[:_MAX_REASON].encode("utf-8", "replace")
            width, height = sample.size_px or (0, 0)
            row = records_N[i]
            row["image_offset"], row["image_size"] = sample.image_offset, sample.image_size
            several = _SEVERAL if sample.several_captions else 0
            row["caption_offset"] = (sample.caption_offset or 0) | several
            row["caption_size"] = sample.caption_size or 0
            row["text_offset"], row["key_bytes"], row["reason_bytes"] = len(text), len(key), len(reason)
            row["content_hash"] = np.void(bytes.fromhex(sample.content_hash))
            row["width_px"], row["height_px"] = width, height
            row["crc32"] = record_crc(row.tobytes(), key + reason)
            text += key + reason
        captioned_M = np.flatnonzero(records_N["caption_offset"]).astype(np.uint32)
        return cls(name, stamp, records_N, captioned_M, np.frombuffer(bytes(text), np.uint8))

    def pack(self) -> bytes:
        """As it stands in the file."""
        return self.records_N.tobytes() + self.captioned_M.tobytes() + self.text.tobytes()


def record_crc(raw: bytes, text: bytes) -> int:
    """CRC-32 of a record without its own CRC-32 field, and of its text."""
    return zlib.crc32(text, zlib.crc32(raw[60:], zlib.crc32(raw[:56])))


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """A shard as the footer describes it."""

    name: str
    size_bytes: int
    mtime_ns: int
    start: int  # of its records in the index file
    images: int
    captioned: int
    text_bytes: int
    crc32: int  # of its records, captioned numbers and text

    @property
    def stamp(self) -> Stamp:
        """Of the shard when it was indexed."""
        return Stamp(self.size_bytes, self.mtime_ns)


def write_index(path: str, shards: Iterable[ShardIndex]) -> None:
    """Write an index file, whole or not at all, one shard in memory at a time (in a store: all).

    Raises:
        OSError, ValueError: the file cannot be written.
    """
    if stores.is_remote(path):
        file = io.BytesIO()
        _write(file, shards)
        stores.write_whole(path, file.getvalue())
        return
    with stores.replacing(path) as file:
        _write(file, shards)
    _open_again.cache_clear()  # the file that was replaced may end in the very same bytes


def _write(file: BinaryIO, shards: Iterable[ShardIndex]) -> None:
    rows: list[IndexedShard] = []
    start = file.write(_HEAD.pack(MAGIC, VERSION))
    for shard in shards:
        data = shard.pack()
        counts = (len(shard.records_N), len(shard.captioned_M), len(shard.text))
        stamp = shard.stamp
        rows.append(
            IndexedShard(shard.name, stamp.size_bytes, stamp.mtime_ns, start, *counts, zlib.crc32(data))
        )
        start += file.write(data)
    footer = json.dumps({"shards": [asdict(row) for row in rows]}).encode()
    file.write(footer + _TRAILER.pack(len(footer), zlib.crc32(footer), MAGIC))


class Index:
    """An open index file. Safe to use from several threads."""

    def __init__(self, path: str, local: str) -> None:
        """Read the footer.

        Args:
            path: the index, as the user named it; relative names of shards are seen from its folder.
            local: the same file on this machine.

        Raises:
            OSError: the file cannot be read.
            ValueError: not an index of this version, or damaged.
        """
        self.path = path
        self._local = local
        self._trailer, self.shards = _read_footer(path, local)
        folder = stores.folder_of(path)
        self.paths = [stores.join(folder, shard.name) for shard in self.shards]

    @classmethod
    def open(cls, path: str) -> Self:
        """Open an index; one in a store is first copied to a temporary folder. Raises as the constructor."""
        if not stores.is_remote(path):
            return cls(path, path)
        folder = tempfile.mkdtemp(prefix="iomm-index-")
        try:
            stores.download(path, f"{folder}/index")
            index = cls(path, f"{folder}/index")
        except BaseException:
            shutil.rmtree(folder)
            raise
        weakref.finalize(index, shutil.rmtree, folder)
        return index

    def _reader(self) -> Reader:
        return _open_again(self.path, self._local, self._trailer)

    def shard(self, k: int) -> ShardIndex:
        """All that is known of the k-th shard.

        Raises:
            ValueError: the index is damaged there.
        """
        row = self.shards[k]
        records, captioned = row.images * RECORD.itemsize, row.captioned * 4
        data = self._reader().read(row.start, records + captioned + row.text_bytes)
        if zlib.crc32(data) != row.crc32:
            raise ValueError(_damaged(self.path, f"{self.paths[k]}'s part does not match its checksum"))
        return ShardIndex(
            row.name,
            row.stamp,
            np.frombuffer(data[:records], RECORD),
            np.frombuffer(data[records : records + captioned], np.dtype("<u4")),
            np.frombuffer(data[records + captioned :], np.uint8),
        )

    def sample(self, k: int, j: int, *, captioned: bool = False) -> SampleRef:
        """The j-th sample of the k-th shard, or the j-th of those with a caption.

        Raises:
            ValueError: the index is damaged there.
        """
        row, path, reader = self.shards[k], self.paths[k], self._reader()
        after_records = row.start + row.images * RECORD.itemsize
        number = int.from_bytes(reader.read(after_records + 4 * j, 4), "little") if captioned else j
        if number >= row.images:
            raise ValueError(_damaged(self.path, f"{path} has no record {number}"))
        raw = reader.read(row.start + number * RECORD.itemsize, RECORD.itemsize)
        record = np.frombuffer(raw, RECORD)[0].item()
        image, caption, text, digest, size, caption_size, width, height, crc, key, reason = record
        if text + key + reason > row.text_bytes:
            raise ValueError(_damaged(self.path, f"record {number} of {path} points outside its text"))
        words = reader.read(after_records + 4 * row.captioned + text, key + reason)
        if record_crc(raw, words) != crc or (captioned and not caption):
            raise ValueError(_damaged(self.path, f"record {number} of {path} does not match its checksum"))
        return SampleRef(
            shard=path,
            key=words[:key].decode("utf-8", "surrogateescape"),
            image_offset=image,
            image_size=size,
            caption_offset=caption & ~_SEVERAL or None,
            caption_size=caption_size if caption else None,
            content_hash=digest.hex(),
            size_px=(width, height) if width else None,
            reason=words[key:].decode() or None,
            several_captions=bool(caption & _SEVERAL),
        )

    def column(self, k: int, fields: Sequence[str], *, captioned: bool) -> NDArray[np.int64]:
        """Fields of all samples of the k-th shard, (N, fields), read by chunks and not checked."""
        row, reader = self.shards[k], self._reader()
        found = np.empty((row.images, len(fields)), np.int64)
        for first in range(0, row.images, _CHUNK):
            count = min(_CHUNK, row.images - first)
            raw = reader.read(row.start + first * RECORD.itemsize, count * RECORD.itemsize)
            records = np.frombuffer(raw, RECORD)
            for f, field in enumerate(fields):
                found[first : first + count, f] = records[field]
        if not captioned:
            return found
        raw = reader.read(row.start + row.images * RECORD.itemsize, 4 * row.captioned)
        return found[np.frombuffer(raw, np.dtype("<u4"))]

    def renewal(self) -> str:
        """The command that makes this index again."""
        if len(self.shards) == 1 and self.path == self.paths[0] + INDEX_SUFFIX:
            return f"iomm shard index {self.paths[0]}"
        folders = dict.fromkeys(stores.folder_of(path) or "." for path in self.paths)
        return f"iomm shard index {' '.join(folders)} -o {self.path}"


def _read_footer(path: str, local: str) -> tuple[bytes, list[IndexedShard]]:
    size = stores.stamp(local).size_bytes
    if size < _HEAD.size + _TRAILER.size:
        raise ValueError(_damaged(path, f"it has {size} bytes"))
    reader = stores.open_reader(local)
    magic, version = _HEAD.unpack(reader.read(0, _HEAD.size))
    trailer = reader.read(size - _TRAILER.size, _TRAILER.size)
    length, crc, end_magic = _TRAILER.unpack(trailer)
    if magic != MAGIC or end_magic != MAGIC or length > size - _HEAD.size - _TRAILER.size:
        raise ValueError(_damaged(path, "it does not begin and end as an index does"))
    if version != VERSION:
        raise ValueError(
            f"{path}: an index of version {version}; this iomm reads version {VERSION}. "
            "Make it again with: iomm shard index"
        )
    footer = reader.read(size - _TRAILER.size - length, length)
    if zlib.crc32(footer) != crc:
        raise ValueError(_damaged(path, "its footer does not match its checksum"))
    return trailer, _shards(path, footer, size - _TRAILER.size - length)


def _shards(path: str, footer: bytes, end: int) -> list[IndexedShard]:
    """The rows of a footer; their parts lie between the head and `end`."""
    try:
        shards = [IndexedShard(**row) for row in json.loads(footer)["shards"]]
        for shard in shards:
            os.fsencode(shard.name)
            numbers = astuple(shard)[1:]
            if "\0" in shard.name or any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError(f"the row {shard}")
            size = shard.images * RECORD.itemsize + 4 * shard.captioned + shard.text_bytes
            if shard.start < _HEAD.size or shard.start + size > end or shard.captioned > shard.images:
                raise ValueError(f"the part of {shard.name!r} lies outside the file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_damaged(path, f"its footer: {type(error).__name__}: {error}")) from error
    return shards


@lru_cache(maxsize=_OPEN_INDEXES)
def _open_again(path: str, local: str, trailer: bytes) -> Reader:
    """An index file that was opened before: still the same one?"""
    size = stores.stamp(local).size_bytes
    reader = stores.open_reader(local)
    if size < _TRAILER.size or reader.read(size - _TRAILER.size, _TRAILER.size) != trailer:
        raise ValueError(f"{path}: the index was replaced while in use. Resume the run with the new one.")
    return reader


def _damaged(path: str, what: str) -> str:
    return f"{path}: not an index, or damaged: {what}. Make it again with: iomm shard index"
