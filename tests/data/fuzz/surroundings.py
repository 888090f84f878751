"""What surrounds a trial: the log that is kept, and the file that changes while it is read."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from iomm.data import sources, stores, tar_members
from tests.data.fuzz.cases import During


@contextlib.contextmanager
def log_kept() -> Iterator[list[logging.LogRecord]]:
    """Warnings of the data package, which are how some entries are accounted for."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("iomm.data")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


@contextlib.contextmanager
def happening(during: During | None) -> Iterator[None]:
    """Count the reads of a file, by offset and of its headers; before one of them something happens to it."""
    if during is None:
        yield
        return
    reads = 0

    def count() -> None:
        nonlocal reads
        reads += 1
        if reads == during.before_read + 1:
            during.action()

    reader_read, open_shard = stores._LocalReader.read, tar_members.open_shard

    def read(self: Any, offset: int, size: int) -> bytes:
        if self._path == str(during.path):
            count()
        return reader_read(self, offset, size)

    def opened(shard: str) -> Any:
        file = open_shard(shard)
        return _Counted(file, count) if shard == str(during.path) else file

    stores._LocalReader.read = read
    tar_members.open_shard = sources.open_shard = opened
    try:
        yield
    finally:
        stores._LocalReader.read = reader_read
        tar_members.open_shard = sources.open_shard = open_shard


class _Counted(io.RawIOBase):
    def __init__(self, file: Any, count: Callable[[], None]) -> None:
        self._file, self._count = file, count

    def read(self, size: int = -1) -> bytes:
        self._count()
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
