"""The headers of a tar shard, and the samples that they make up.

A sample is every member of a shard that shares a key, the name up to its first dot: `1f600.webp` is the image
of sample `1f600`, `1f600.txt` its caption, or `1f600.json` several, as a list. Other suffixes are left alone.
Nothing is ever extracted, so a member's name never becomes a path of this machine.
"""

import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from iomm.data import stores

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIX = "txt"
CAPTIONS_SUFFIX = "json"  # a list; JSON of any other kind is left alone
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 20  # of one member with its long name and attributes, bytes
_MAX_FILLING = 1 << 16  # zeros behind the last member, bytes; tar programs fill up to 10,240
# Damaged numbers and attributes make tarfile raise ordinary errors too, a long chain of headers the last one.
_DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample's bytes lie, and what an index knows of it. Offsets and sizes in bytes from the start
    of the shard."""

    shard: str
    key: str
    image_offset: int
    image_size: int
    caption_offset: int | None
    caption_size: int | None
    # From an index; None without one.
    content_hash: str | None = None  # `cache_key` of the image file
    size_px: tuple[int, int] | None = None  # width, height, upright; None too where the header is unreadable
    reason: str | None = None  # why the image cannot be used; None: it decodes
    # From the member's name, with or without an index.
    several_captions: bool = False  # the caption file is a JSON list of them


@dataclass(frozen=True, slots=True)
class Member:
    """A tar header. Offset and size of the data in bytes."""

    name: str
    offset: int
    size: int
    plain: bool  # a file, as opposed to a link, device or sparse file


class _HeaderReader:
    """A file that refuses to read a header of gigabytes into memory, which a damaged one may ask for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes, more than the limit of {_MAX_HEADER}")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def members(shard: str, file: BinaryIO) -> Iterator[Member]:
    """Every member of a tar but folders, up to the end marker, which must be there.

    Args:
        shard: named in errors.
        file: the shard, open at its start.

    Raises:
        ValueError: not a tar, torn or damaged. What stands before the damage was yielded.
    """
    try:
        tar = tarfile.open(fileobj=_HeaderReader(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
    except _DAMAGE as error:
        raise ValueError(
            f"{shard}: not a tar file at offset 0 ({error}). Shards are uncompressed tar files."
        ) from error
    before = -1
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile would keep them all
            if member.size < 0 or member.offset_data <= before:
                raise tarfile.ReadError(f"a member of {member.size} bytes at {member.offset_data}")
            before = member.offset_data
            if not member.isdir():
                plain = member.isreg() and not member.issparse()
                yield Member(member.name, member.offset_data, member.size, plain)
    except _DAMAGE as error:
        raise ValueError(torn(shard, tar.offset, str(error))) from error
    _check_end(shard, file, tar.offset)


def scan(shard: str) -> list[SampleRef]:
    """The samples of one shard that have an image, in the order of their images.

    Raises:
        OSError: the shard cannot be read.
        ValueError: not a tar, torn, or with nested, linked or duplicated members.
    """
    images: dict[str, tuple[int, int]] = {}
    captions: dict[str, tuple[int, int]] = {}
    lists: dict[str, tuple[int, int]] = {}
    last, seen, closed, second = "", set[str](), set[str](), list[str]()
    for name, offset, size in _plain_members(shard):
        base = name.removeprefix("./")
        key, _, suffix = base.partition(".")
        if not key:
            continue  # a hidden file, such as the ._KEY.jpg that macOS adds
        if base in seen or key in closed:
            raise ValueError(
                f"{shard}: key {key!r} comes twice (second time as {name!r} at byte {offset}). "
                "A sample's members stand together, each once. Rename one of the samples."
            )
        if key != last:
            closed.add(last)
            last, seen = key, set()
        seen.add(base)
        if suffix.lower() in IMAGE_SUFFIXES:
            if images.setdefault(key, (offset, size)) != (offset, size):
                second.append(base)
        elif suffix.lower() == CAPTION_SUFFIX:
            captions[key] = (offset, size)
        elif suffix.lower() == CAPTIONS_SUFFIX:
            lists[key] = (offset, size)
    lists = {key: place for key, place in lists.items() if key not in captions and _is_list(shard, *place)}
    imageless = [key for key in (*closed, last) if key and key not in images]
    _say_left_out(shard, imageless, "keys without an image")
    _say_left_out(shard, second, "images whose key has one already")
    captions |= lists
    return [
        SampleRef(shard, key, *place, *captions.get(key, (None, None)), several_captions=key in lists)
        for key, place in images.items()
    ]


def _say_left_out(shard: str, names: Sequence[str], what: str) -> None:
    if names:
        _log.warning("%s: %d %s left out, such as %r", shard, len(names), what, min(names))


def _is_list(shard: str, offset: int, size: int) -> bool:
    """Whether a JSON file begins as a list does."""
    return stores.open_reader(shard).read(offset, min(size, 64)).lstrip()[:1] == b"["


def _plain_members(shard: str) -> Iterator[tuple[str, int, int]]:
    with open_shard(shard) as file:
        for member in members(shard, file):
            if not member.plain:
                raise ValueError(
                    f"{shard}: member {member.name!r} is a link, device or sparse file. "
                    "Shards hold plain files only: pack the file itself."
                )
            if "/" in member.name.removeprefix("./"):
                raise ValueError(
                    f"{shard}: member {member.name!r} lies in a folder. Keys are flat (KEY.webp, KEY.txt). "
                    "Pack the files from inside it, or pack the shard again with: iomm shard make"
                )
            yield member.name, member.offset, member.size


def open_shard(shard: str) -> BinaryIO:
    """A shard open for its headers, wherever it lies."""
    if not stores.is_remote(shard):
        return open(shard, "rb")
    store, inner = stores.store_of(shard)
    return store.open(inner, "rb")


def _check_end(shard: str, file: BinaryIO, offset: int) -> None:
    """Zeros from `offset` to the end of the file: at least one block of them, and at most `_MAX_FILLING`.

    tarfile takes a missing end, a damaged header, a second archive, or the zeros that an unfinished download
    or a crash leaves, for the end of the shard, and samples would be lost in silence.
    """
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise ValueError(torn(shard, offset, "no end-of-archive marker"))
    zeros = 0
    while block:
        zeros += len(block)
        if zeros > _MAX_FILLING:
            what = f"more than {_MAX_FILLING} zeros, as an unfinished download leaves them"
            raise ValueError(torn(shard, offset, what))
        if block.count(0) != len(block):
            raise ValueError(
                torn(
                    shard, offset, "no member's header here, and no end-of-archive marker with nothing after"
                )
            )
        block = file.read(_CHUNK)


def torn(shard: str, offset: int, what: str) -> str:
    """The message about a shard that is damaged from `offset` on."""
    return (
        f"{shard}: torn or damaged at offset {offset}: {what}. "
        "Every shard must be one complete tar file. Copy or build it again."
    )
