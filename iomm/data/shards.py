"""WebDataset tar shards: one scan of the headers, then reads at known offsets.

A sample is every member of a shard that shares a key, the name up to its first dot: `1f600.webp` is the image
of sample `1f600`, `1f600.txt` its caption. Other suffixes are left alone. Nothing is ever extracted, so a
member's name never becomes a path of this machine.

The scan reads every header when a set is opened. An index file beside a shard, object stores and pre-decoded
shards would replace `_scan` and `_Descriptor`; nothing else here knows that a shard is a local tar file.
"""

import glob
import logging
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from iomm.data.errors import BadSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIX = "txt"
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_OPEN_SHARDS = 128  # descriptors kept open; a process is usually allowed 1,024
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample's bytes lie. Offsets and sizes in bytes from the start of the shard."""

    shard: str
    key: str
    image_offset: int
    image_size: int
    caption_offset: int | None
    caption_size: int | None


class ShardSet:
    """The samples of some shards, in shard order, then in the order of their images within a shard.

    Reads are safe from several threads: they use `os.pread` and share no position.
    """

    def __init__(self, refs: Sequence[SampleRef]) -> None:
        self._refs = refs
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, _Descriptor] = OrderedDict()

    @classmethod
    def open(cls, patterns: Sequence[str], *, captioned_only: bool = False) -> Self:
        """Scan the headers of every shard that `patterns` name.

        Args:
            patterns: paths or globs of tar files. Each glob's shards are sorted by name.
            captioned_only: keep only the samples that have a caption.

        Raises:
            FileNotFoundError: a path or glob that names no file.
            ValueError: a shard named twice, not a tar, torn, with nested, linked or duplicated members; or no
                sample left.
        """
        shards = _expand(patterns)
        refs = [ref for shard in shards for ref in _scan(shard)]
        kept = [ref for ref in refs if ref.caption_offset is not None] if captioned_only else refs
        if not kept:
            what = f"{len(refs)} images, none with a caption (KEY.{CAPTION_SUFFIX})" if refs else "no image"
            raise ValueError(
                f"shards {', '.join(patterns)} hold {what}. "
                f"A sample is KEY.{'|'.join(IMAGE_SUFFIXES)}, with its caption in KEY.{CAPTION_SUFFIX}. "
                "Name other shards."
            )
        return cls(kept)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, i: int) -> SampleRef:
        return self._refs[i]

    def image_bytes(self, i: int) -> bytes:
        """The image file of sample `i` as it lies in the shard.

        Raises:
            OSError: the shard cannot be read, or became shorter since it was opened.
        """
        ref = self._refs[i]
        return self._read(ref.shard, ref.image_offset, ref.image_size)

    def caption(self, i: int) -> str | None:
        """The caption of sample `i` without surrounding white space; None if the sample has none.

        Raises:
            BadSample: the caption is not UTF-8, or empty.
            OSError: as for `image_bytes`.
        """
        ref = self._refs[i]
        if ref.caption_offset is None or ref.caption_size is None:
            return None
        try:
            text = self._read(ref.shard, ref.caption_offset, ref.caption_size).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadSample(
                f"the caption is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
            ) from error
        if not text:
            raise BadSample("the caption is empty")
        return text

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        with self._lock:
            descriptor = self._descriptors.get(shard) or _Descriptor(shard)
            self._descriptors[shard] = descriptor
            self._descriptors.move_to_end(shard)
            if len(self._descriptors) > _OPEN_SHARDS:
                self._descriptors.popitem(last=False)
        return descriptor.read(offset, size)


class _Descriptor:
    """An open shard. Closed with its last reader, so that dropping it never disturbs a read in flight."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._fd = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        parts, wanted = [], size
        while wanted:
            part = os.pread(self._fd, wanted, offset + size - wanted)
            if not part:
                raise OSError(
                    f"{self._shard}: ends before byte {offset + size}, which its headers promise. "
                    "The shard was changed while in use: restore it and resume the run."
                )
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)


def _expand(patterns: Sequence[str]) -> list[str]:
    """The shards in order; every pattern must name at least one, and no shard may come twice."""
    shards: list[str] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if Path(path).is_file()]
        if not found:
            raise FileNotFoundError(
                f"no shard matches {pattern!r}. Every path or glob must name at least one tar file, "
                f"seen from {Path.cwd()}. Correct the path, or build the shard first."
            )
        shards += found
    seen: dict[str, str] = {}
    for shard in shards:
        real = os.path.realpath(shard)
        if real in seen:
            raise ValueError(
                f"shard {shard} is named twice (also as {seen[real]}) by {', '.join(patterns)}. "
                "Each shard counts once: remove one of the patterns."
            )
        seen[real] = shard
    return shards


def _scan(shard: str) -> list[SampleRef]:
    """The samples of one shard that have an image.

    Raises:
        ValueError: as in `ShardSet.open`.
    """
    images: dict[str, tuple[int, int]] = {}
    captions: dict[str, tuple[int, int]] = {}
    last, seen, closed = "", set[str](), set[str]()
    for name, offset, size in _members(shard):
        folder, _, base = name.removeprefix("./").rpartition("/")
        key, _, suffix = base.partition(".")
        if folder:
            raise ValueError(
                f"{shard}: member {name!r} lies in a folder. Keys are flat (KEY.webp, KEY.txt). "
                "Pack the files from inside it."
            )
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
            images.setdefault(key, (offset, size))
        elif suffix.lower() == CAPTION_SUFFIX:
            captions[key] = (offset, size)
    imageless = [key for key in (*closed, last) if key and key not in images]
    if imageless:
        _log.warning(
            "%s: %d keys without an image left out, such as %r", shard, len(imageless), min(imageless)
        )
    return [SampleRef(shard, key, *place, *captions.get(key, (None, None))) for key, place in images.items()]


def _members(shard: str) -> list[tuple[str, int, int]]:
    """(name, data offset, size) of every plain file in a tar, which must be complete to its end marker."""
    found: list[tuple[str, int, int]] = []
    with open(shard, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` is what needs closing
        except tarfile.ReadError as error:
            raise ValueError(
                f"{shard}: not a tar file at offset 0 ({error}). Shards are uncompressed tar files."
            ) from error
        try:
            for member in tar:
                if member.isreg() and not member.issparse():
                    found.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    raise ValueError(
                        f"{shard}: member {member.name!r} is a link, device or sparse file. "
                        "Shards hold plain files only: pack the file itself."
                    )
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(_torn(shard, tar.offset, str(error))) from error
        _check_end(shard, file, tar.offset)
    return found


def _check_end(shard: str, file: BinaryIO, offset: int) -> None:
    """Zeros from `offset` to the end of the file, and at least one block of them.

    tarfile takes a missing end, a damaged header or a second archive for the end of the shard, and samples
    would be lost in silence.
    """
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise ValueError(_torn(shard, offset, "no end-of-archive marker"))
    while block:
        if block.count(0) != len(block):
            raise ValueError(
                _torn(
                    shard, offset, "no member's header here, and no end-of-archive marker with nothing after"
                )
            )
        block = file.read(_CHUNK)


def _torn(shard: str, offset: int, what: str) -> str:
    return (
        f"{shard}: torn or damaged at offset {offset}: {what}. "
        "Every shard must be one complete tar file. Copy or build it again."
    )
