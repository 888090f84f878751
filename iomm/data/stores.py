"""Where shards lie: local paths, and object stores (`s3://`, `gs://`, ...) through fsspec.

Everything is read by ranges, so a shard in a store costs what is used of it. A local read shares no file
position between threads.
"""

import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

INDEX_SUFFIX = ".index"
_CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_COPY_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells that a file is still the one that was seen."""

    size_bytes: int
    mtime_ns: int  # 0 in an object store: an upload has a time of its own, and objects are replaced whole


class Reader(Protocol):
    """An open file that threads share."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            OSError: the file cannot be read, or ends before that.
        """
        ...


def is_remote(path: str) -> bool:
    """Whether a path is an address in an object store."""
    return "://" in path and not path.startswith("file://")


def store_of(path: str) -> tuple[Any, str]:
    """The fsspec client of a remote path, and the path as that client knows it.

    Raises:
        ValueError: no such kind of store, or its client is not installed.
    """
    kind = path.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        package = _CLIENTS.get(kind, f"the fsspec client of {kind}")
        raise ValueError(
            f"{path}: the client of this store is not installed ({error}). Install it: pip install {package}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}. Stores are named by their fsspec scheme: {', '.join(_CLIENTS)}."
        ) from error


def open_reader(path: str) -> Reader:
    """A file open for ranged reads.

    Raises:
        OSError, ValueError: it cannot be opened; as in `store_of`.
    """
    return _RemoteReader(path) if is_remote(path) else _LocalReader(path)


class _LocalReader:
    """Closed with its last user, so that dropping it never disturbs a read in flight."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        parts, wanted = [], size
        while wanted:
            try:
                part = os.pread(self._fd, wanted, offset + size - wanted)
            except OSError as error:  # which says no name
                raise OSError(error.errno, error.strerror, self._path) from error
            except OverflowError as error:  # no file reaches that far
                raise OSError(_ended(self._path, offset + size)) from error
            if not part:
                raise OSError(_ended(self._path, offset + size))
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)


class _RemoteReader:
    def __init__(self, path: str) -> None:
        self._path = path
        self._store, self._inner = store_of(path)

    def read(self, offset: int, size: int) -> bytes:
        if not size:
            return b""
        try:
            data: bytes = self._store.cat_file(self._inner, start=offset, end=offset + size)
        except OSError:
            raise
        except Exception as error:  # each client has errors of its own
            raise OSError(
                f"{self._path}: reading bytes {offset} to {offset + size} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if len(data) != size:
            raise OSError(_ended(self._path, offset + size))
        return data


def _ended(path: str, end: int) -> str:
    return (
        f"{path}: ends before byte {end}, which its headers promise. "
        "The shard was changed while in use: restore it and resume the run."
    )


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that paths and globs name, in order; those of one glob sorted.

    A glob leaves out index files unless it ends in `.index` itself.

    Raises:
        FileNotFoundError: a pattern that names no file.
        ValueError: a file named twice; as in `store_of`.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = _remote_matches(pattern) if is_remote(pattern) else _local_matches(pattern)
        if found != [pattern] and not pattern.endswith(INDEX_SUFFIX):
            found = [path for path in found if not path.endswith(INDEX_SUFFIX)]
        if not found:
            raise FileNotFoundError(
                f"no shard matches {pattern!r}. Every path or glob must name at least one tar file, "
                f"seen from {Path.cwd()}. Correct the path, or build the shard first."
            )
        paths += found
    refuse_twice(paths, patterns)
    return paths


def refuse_twice(paths: Sequence[str], patterns: Sequence[str]) -> None:
    """Raises:
    ValueError: one file stands in `paths` twice, under whatever name.
    """
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if is_remote(path):
            store, inner = store_of(path)
            real = store.unstrip_protocol(inner)
        if real in seen:
            raise ValueError(
                f"shard {path} is named twice (also as {seen[real]}) by {', '.join(patterns)}. "
                "Each shard counts once: remove one of the patterns."
            )
        seen[real] = path


def _local_matches(pattern: str) -> list[str]:
    pattern = pattern.removeprefix("file://")
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    return [path for path in found if Path(path).is_file()]


def _remote_matches(pattern: str) -> list[str]:
    store, inner = store_of(pattern)
    if store.isfile(inner):
        return [pattern]
    if not glob.has_magic(pattern):
        return []
    found: list[str] = store.glob(inner)
    return [store.unstrip_protocol(path) for path in sorted(found) if store.isfile(path)]


def stamps(paths: Sequence[str]) -> dict[str, Stamp]:
    """The stamps of those of `paths` that exist. In a store, one listing a folder, not one call a file.

    Raises:
        OSError, ValueError: the file system or store does not answer; as in `store_of`.
    """
    found: dict[str, Stamp] = {}
    listed: dict[str, dict[str, int]] = {}
    for path in paths:
        if not is_remote(path):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            found[path] = Stamp(status.st_size, status.st_mtime_ns)
            continue
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            listed[folder] = _listing(folder)
        if name in listed[folder]:
            found[path] = Stamp(listed[folder][name], 0)
    return found


def stamp(path: str) -> Stamp:
    """The stamp of a file.

    Raises:
        FileNotFoundError: there is none. OSError, ValueError: as in `stamps`.
    """
    found = stamps([path])
    if path not in found:
        raise FileNotFoundError(f"{path}: no such file. Correct the path, or put it back.")
    return found[path]


def _listing(folder: str) -> dict[str, int]:
    """File sizes in bytes by name."""
    store, inner = store_of(folder)
    try:
        rows: list[dict[str, Any]] = store.ls(inner, detail=True)
    except FileNotFoundError:
        return {}
    return {row["name"].rpartition("/")[2]: int(row["size"] or 0) for row in rows if row["type"] == "file"}


def join(folder: str, name: str) -> str:
    """A name seen from a folder; an address or an absolute path stays as it is."""
    if is_remote(name) or os.path.isabs(name) or not folder:
        return name
    return f"{folder}/{name}" if is_remote(folder) else os.path.join(folder, name)


def folder_of(path: str) -> str:
    """The folder of a file, local or remote."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def write_whole(path: str, data: bytes) -> None:
    """Put a whole file in place, or nothing.

    Raises:
        OSError, ValueError: it cannot be written; as in `store_of`.
    """
    if is_remote(path):
        store, inner = store_of(path)
        store.pipe_file(inner, data)
        return
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A local file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path to the same bytes: the path itself, or a copy of an object that ends with the block."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="iomm-shard-") as folder:
        download(path, local := f"{folder}/shard")
        yield local


def download(path: str, local: str) -> None:
    """Copy an object to a local file. Raises OSError, ValueError as `store_of` and the store's client."""
    store, inner = store_of(path)
    with open(local, "wb") as file, store.open(inner, "rb") as remote:
        while chunk := remote.read(_COPY_CHUNK):
            file.write(chunk)


def seen_from(folder: str, path: str) -> str:
    """The name of a file as an index in `folder` notes it: relative where both lie in the same place.

    Raises:
        ValueError: a local file, seen from a store.
    """
    if is_remote(path):
        return path.removeprefix(folder + "/") if is_remote(folder) else path
    if is_remote(folder):
        raise ValueError(
            f"the shard {path} is on this machine, its index would be in a store ({folder}). Upload both."
        )
    return os.path.relpath(path, folder or ".")
