"""What `iomm shard make` packs: folders of images, tar files, Parquet files with image bytes.

A source hands out its images in an order of its own that does not change, and everything else that it holds
as rejected, with a reason; nothing is read but names and headers (of Parquet: the rows).
"""

import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from iomm.data import stores
from iomm.data.inspection import Item, Limits, Place, Rejected
from iomm.data.tar_members import CAPTION_SUFFIX, IMAGE_SUFFIXES, Member, members, open_shard

PYARROW = "pip install 'iomm[parquet]'"
_JSON_SUFFIX = "json"
_ARCHIVES = ("tar", "parquet")
_ROWS = 64  # of Parquet read at once


class Source(Protocol):
    """Images of one kind of place."""

    @property
    def path(self) -> str:
        """As the user named it."""
        ...

    def fingerprint(self) -> str:
        """Changes when what `items` hands out, its order or its number may have changed."""
        ...

    def items(self, start: int = 0) -> Iterator[Item | Rejected]:
        """Everything in the source but the first `start` entries."""
        ...


_USUAL = {"image_column": "image", "caption_field": "caption", "caption_column": "caption"}


def _told(**names: str) -> str:
    """Of the fields and columns that a source was told to read, those that are not the usual ones."""
    return "".join(f", {kind} {name}" for kind, name in names.items() if name != _USUAL[kind])


@dataclass(frozen=True)
class FolderSource:
    """Every file of a folder and its sub-folders. KEY.txt or KEY.json beside KEY.jpg is its caption."""

    path: str
    caption_field: str = "caption"

    def fingerprint(self) -> str:
        crc, count = 0, 0
        for folder, names in self._folders():
            for name in names:
                crc, count = zlib.crc32(os.fsencode(os.path.join(folder, name)) + b"\0", crc), count + 1
        return f"folder of {count} files, names {crc:08x}{_told(caption_field=self.caption_field)}"

    def items(self, start: int = 0) -> Iterator[Item | Rejected]:
        return itertools.islice(self._items(), start, None)

    def _folders(self) -> Iterator[tuple[str, list[str]]]:
        for folder, folders, names in os.walk(self.path, onerror=_raise):
            folders.sort()
            names += [name for name in folders if os.path.islink(os.path.join(folder, name))]  # not followed
            yield folder, sorted(name for name in names if not name.startswith("."))

    def _items(self) -> Iterator[Item | Rejected]:
        for folder, names in self._folders():
            captions = {name for name in names if _suffix(name) in (CAPTION_SUFFIX, _JSON_SUFFIX)}
            stems = {name.rpartition(".")[0] or name for name in names if name not in captions}
            for name in names:
                path = os.path.join(folder, name)
                if name in captions:
                    if name.rpartition(".")[0] not in stems:
                        yield Rejected(path, "a caption, but no image has its name")
                elif _suffix(name) in _ARCHIVES:
                    yield Rejected(path, "not looked into: name it as a source of its own")
                elif not os.path.isfile(path):
                    yield Rejected(path, "not a plain file, but a device, or a link to a folder or nowhere")
                else:
                    yield self._item(folder, name, captions)

    def _item(self, folder: str, name: str, captions: set[str]) -> Item:
        path = os.path.join(folder, name)
        stem = name.rpartition(".")[0] or name
        key = os.path.relpath(os.path.join(folder, stem), self.path)
        for suffix, field in ((CAPTION_SUFFIX, None), (_JSON_SUFFIX, self.caption_field)):
            caption = os.path.join(folder, f"{stem}.{suffix}")
            if f"{stem}.{suffix}" in captions and os.path.isfile(caption):
                return Item(path, key, _file(path), _file(caption), field)
        return Item(path, key, _file(path))


@dataclass(frozen=True)
class TarSource:
    """The samples of a tar file, whatever its state: what is damaged is rejected, the rest is used.

    Keys are names up to the first dot, as in WebDataset, but may lie in folders and need not stand together.
    """

    path: str
    limits: Limits
    caption_field: str = "caption"

    def fingerprint(self) -> str:
        return f"{stores.stamp(self.path)}{_told(caption_field=self.caption_field)}"

    def items(self, start: int = 0) -> Iterator[Item | Rejected]:
        return itertools.islice(self._items(), start, None)

    def _items(self) -> Iterator[Item | Rejected]:
        captions: dict[str, tuple[Place, str | None]] = {}
        images: dict[str, Place] = {}
        keys: dict[str, str] = {}  # with one of its members
        names: set[str] = set()
        rejected: dict[str, Rejected] = {}
        for member in self._members(rejected):
            name, key, suffix = _split(member.name)
            if name.rpartition("/")[2].startswith("."):
                continue  # hidden, such as the ._KEY.jpg that macOS adds
            keys.setdefault(key, name)
            place = Place(self.path, member.offset, member.size)
            fault = _fault(member, name in names, suffix in IMAGE_SUFFIXES and key in images)
            names.add(name)
            if fault:
                rejected[f"{name} at byte {member.offset}"] = Rejected(f"{self.path}: {name}", fault)
            elif suffix in IMAGE_SUFFIXES:
                images[key] = place
            elif suffix == CAPTION_SUFFIX or (suffix == _JSON_SUFFIX and key not in captions):
                captions[key] = (place, self.caption_field if suffix == _JSON_SUFFIX else None)
        for key, place in images.items():
            yield Item(f"{self.path}: {keys[key]}", key, place, *captions.get(key, (None, None)))
        yield from rejected.values()
        faulty = {row.name for row in rejected.values()}
        for key, name in keys.items():
            if key not in images and f"{self.path}: {name}" not in faulty:
                reason = f"no image ({', '.join(IMAGE_SUFFIXES)}) of key {key!r}"
                yield Rejected(f"{self.path}: {name}", reason)

    def _members(self, rejected: dict[str, Rejected]) -> Iterator[Member]:
        count = 0
        try:
            with open_shard(self.path) as file:
                for member in members(self.path, file):
                    count += 1
                    if count > self.limits.max_members:
                        reason = f"more than {self.limits.max_members} members; the rest was not read"
                        rejected[""] = Rejected(self.path, reason)
                        return
                    yield member
        except ValueError as error:  # torn or damaged; what stands before it is good
            rejected[""] = Rejected(self.path, f"{error} What stands before was read.")


def _fault(member: Member, again: bool, second_image: bool) -> str | None:
    if not member.plain:
        return "a link, device or sparse file"
    if again:
        return "a second member of this name"
    return "a second image of this key" if second_image else None


@dataclass(frozen=True)
class ParquetSource:
    """The rows of a Parquet file with a column of image files: bytes, or records of `bytes` and `path`."""

    path: str
    image_column: str = "image"
    caption_column: str = "caption"

    def fingerprint(self) -> str:
        told = _told(image_column=self.image_column, caption_column=self.caption_column)
        return f"{stores.stamp(self.path)}{told}"

    def items(self, start: int = 0) -> Iterator[Item | Rejected]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ValueError(f"{self.path}: reading Parquet needs pyarrow. Install it: {PYARROW}") from error
        try:
            with stores.local_copy(self.path) as local, ParquetFile(local) as file:
                yield from itertools.islice(self._items(file), start, None)
        except (ArrowException, OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's, not the decompressor's
            yield Rejected(self.path, f"a damaged Parquet file: {error}. What stands before was read.")

    def _items(self, file: Any) -> Iterator[Item | Rejected]:
        names: list[str] = file.schema_arrow.names
        if self.image_column not in names:
            raise ValueError(
                f"{self.path} has the columns {', '.join(names)}, none named {self.image_column!r}. "
                "Name the one that holds the image files with --image-column."
            )
        columns = [name for name in (self.image_column, self.caption_column) if name in names]
        stem = Path(self.path).stem
        row = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            for record in batch.to_pylist():
                yield self._item(record, f"{self.path}: row {row}", f"{stem}_{row:08}")
                row += 1

    def _item(self, record: dict[str, Any], name: str, key: str) -> Item | Rejected:
        image, caption = record[self.image_column], record.get(self.caption_column)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            return Rejected(name, "no image bytes in this row")
        if isinstance(caption, list):  # of several captions
            texts = [text if isinstance(text, str) else None for text in caption]
            return Item(name, key, image, json.dumps(texts).encode(), self.caption_column)
        if isinstance(caption, str):
            caption = caption.encode("utf-8", "surrogatepass")
        return Item(name, key, image, caption if isinstance(caption, bytes) else None)


def open_sources(
    paths: Sequence[str], limits: Limits, *, image_column: str, caption_field: str
) -> list[FolderSource | TarSource | ParquetSource]:
    """The sources that paths name, in their order; a glob names several.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: neither a folder, nor a tar, nor a Parquet file.
    """
    found: list[FolderSource | TarSource | ParquetSource] = []
    for path in paths:
        if not stores.is_remote(path) and os.path.isdir(path):
            found.append(FolderSource(path.rstrip("/") or "/", caption_field))
            continue
        for file in stores.expand([path]):
            if file.endswith(".parquet"):
                found.append(ParquetSource(file, image_column, caption_field))
            elif stores.is_remote(file) or file.endswith(".tar") or tarfile.is_tarfile(file):
                found.append(TarSource(file, limits, caption_field))
            else:
                raise ValueError(f"{file} is no folder, tar or Parquet file. Name what holds the images.")
    return found


def _split(name: str) -> tuple[str, str, str]:
    """A member's name without a leading ./, its key with its folders, its suffix in lower case."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return name, folder + slash + stem, suffix.lower()


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _file(path: str) -> Place:
    return Place(path, 0, os.stat(path).st_size)


def _raise(error: OSError) -> None:
    raise error
