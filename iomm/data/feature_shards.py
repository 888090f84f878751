"""Feature shards: what frozen encoders made of images, in files written once and read row by row.

    header     JSON of the safetensors format, which the file is, with a CRC-32 of itself and the records
    records    one a row: key, first token, tokens, CRC-32 of each output                  (N,)
    outputs    of each output the tokens of all rows, one row after the other              (T, C)

Opening reads header and records. A row is read when it is used, and not mapped: a file that shrinks under a
map would kill the process. Its CRC-32s are compared then, so damage costs a row and is never trained on.

N rows; L tokens of C numbers in a row, T in the file. All outputs of a row have the same L; rows may differ.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iomm.data import stores
from iomm.data.stores import Reader

SUFFIX = ".safetensors"
FORMAT = "iomm features 1"
_KEY_BYTES = 16
_MAX_HEADER = 1 << 20
_OPEN_PARTS = 64  # descriptors kept open
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Row = Mapping[str, Tensor]  # the outputs of one image by name, each (L, C)
Layout = dict[str, tuple[torch.dtype, int]]  # dtype and C of each output by name


class TornPart(ValueError):
    """A file that is incomplete, damaged or no feature shard."""


class DamagedRow(ValueError):
    """A row whose bytes are not those that were written."""


def layout_of(row: Row) -> Layout:
    """Dtype and numbers in a token of each output.

    Raises:
        ValueError: an output that is not (L, C), outputs of different L, or a dtype that cannot be kept.
    """
    for name, value in row.items():
        tokens = next(iter(row.values())).shape[0]
        if value.ndim != 2 or value.shape[0] != tokens or value.dtype not in _NAMES:
            raise ValueError(
                f"output {name} is {tuple(value.shape)} {value.dtype}; every output of a row must be "
                f"(tokens, numbers) with equally many tokens, of {', '.join(map(str, _NAMES))}."
            )
    return {name: (value.dtype, value.shape[1]) for name, value in row.items()}


def row_bytes(layout: Layout, tokens: int) -> int:
    """Bytes that a row of L `tokens` takes on disk."""
    return _record(len(layout)).itemsize + sum(_token_bytes(layout, name) * tokens for name in layout)


def write_part(path: Path, rows: Mapping[str, Row]) -> None:
    """Write rows by key, whole or not at all.

    Args:
        rows: at least one; keys of 32 hexadecimal digits, all of one layout.
    Raises:
        OSError: the file cannot be written.
    """
    layout = layout_of(next(iter(rows.values())))
    records_N = np.zeros(len(rows), _record(len(layout)))
    total = 0
    for n, (key, row) in enumerate(rows.items()):
        record, tokens = records_N[n], next(iter(row.values())).shape[0]
        record["key"], record["first"], record["tokens"] = np.void(bytes.fromhex(key)), total, tokens
        record["crc32"][: len(layout)] = [zlib.crc32(_raw(row[name])) for name in layout]
        total += tokens
    records = records_N.tobytes()
    header = _header(layout, records, len(rows), total)
    with stores.replacing(str(path)) as file:
        file.write(len(header).to_bytes(8, "little") + header + records)
        for name in layout:
            for row in rows.values():
                file.write(_raw(row[name]))


@dataclass(frozen=True)
class Part:
    """An open feature shard. Safe to use from several threads."""

    path: Path
    stamp: stores.Stamp
    layout: Layout
    starts: Mapping[str, int]  # where the records and each output begin in the file

    @classmethod
    def open(cls, path: Path) -> tuple[Self, NDArray[np.void]]:
        """Read the header and the records.

        Returns:
            the part, and the keys of its rows (N,), 16 bytes each.
        Raises:
            TornPart: incomplete, damaged, gone, or something else.
        """
        try:
            stamp = stores.stamp(str(path))
            reader = _reader(str(path), stamp)
            length = int.from_bytes(reader.read(0, 8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(reader.read(8, length))
            about = header.pop("__metadata__")
            starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
            end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
            if end != stamp.size_bytes:
                raise ValueError(f"it has {stamp.size_bytes} bytes, its header promises {end}")
            first, after = header["records"]["data_offsets"]
            records = reader.read(starts["records"], after - first)
            crc32 = zlib.crc32(records, zlib.crc32(_described(header)))
            if about != {"format": FORMAT, "crc32": str(crc32)}:
                raise ValueError(f"header and records do not match their checksum, or are not {FORMAT}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TornPart(f"{type(error).__name__}: {error}") from error
        layout: Layout = {
            name: (_DTYPES[entry["dtype"]], entry["shape"][1])
            for name, entry in header.items()
            if name != "records"
        }
        part = cls(path, stamp, layout, starts)
        return part, np.frombuffer(records, _record(len(layout)))["key"].copy()

    def key(self, n: int) -> str:
        """The key of row n.

        Raises:
            DamagedRow: it cannot be read.
        """
        return self._record(n)["key"].tobytes().hex()

    def read(self, n: int, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Some outputs of row n, each (L, C), on the CPU.

        Raises:
            DamagedRow: the bytes are not those that were written, or cannot be read.
        """
        record, found = self._record(n), dict[str, Tensor]()
        for name in outputs:
            size = _token_bytes(self.layout, name)
            start = self.starts[name] + int(record["first"]) * size
            data = bytearray(self._bytes(n, start, int(record["tokens"]) * size))
            if zlib.crc32(data) != record["crc32"][list(self.layout).index(name)]:
                raise DamagedRow(f"row {n} of {self.path}: {name} does not match its checksum")
            dtype, numbers = self.layout[name]
            found[name] = torch.frombuffer(data, dtype=dtype).view(-1, numbers)
        return found

    def _record(self, n: int) -> np.void:
        dtype = _record(len(self.layout))
        raw = self._bytes(n, self.starts["records"] + n * dtype.itemsize, dtype.itemsize)
        return np.frombuffer(raw, dtype)[0]

    def _bytes(self, n: int, start: int, size: int) -> bytes:
        try:
            return _reader(str(self.path), self.stamp).read(start, size)
        except OSError as error:
            raise DamagedRow(f"row {n} of {self.path}: {error}") from error


def _record(outputs: int) -> np.dtype[np.void]:
    """Of a whole number of 8 bytes, so that the outputs behind the records are aligned."""
    crc32 = ("crc32", "<u4", (outputs | 1,))
    return np.dtype([("key", f"V{_KEY_BYTES}"), ("first", "<u8"), ("tokens", "<u4"), crc32])


def _token_bytes(layout: Layout, name: str) -> int:
    dtype, numbers = layout[name]
    return dtype.itemsize * numbers


def _header(layout: Layout, records: bytes, rows: int, tokens: int) -> bytes:
    """The safetensors header, padded to 8 bytes."""
    end = len(records)
    shape = [rows, _record(len(layout)).itemsize]
    entries: dict[str, Any] = {"records": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}}
    for name, (dtype, numbers) in layout.items():
        offsets = [end, end + tokens * _token_bytes(layout, name)]
        entries[name] = {"dtype": _NAMES[dtype], "shape": [tokens, numbers], "data_offsets": offsets}
        end = offsets[1]
    crc32 = zlib.crc32(records, zlib.crc32(_described(entries)))
    text = json.dumps({"__metadata__": {"format": FORMAT, "crc32": str(crc32)}, **entries}).encode()
    return text + b" " * (-len(text) % 8)


def _described(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries, sort_keys=True).encode()


def _raw(value: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return value.flatten().view(torch.uint8).numpy().data


@lru_cache(maxsize=_OPEN_PARTS)
def _reader(path: str, stamp: stores.Stamp) -> Reader:
    """A part open for reading; a part that took its place has another stamp."""
    return stores.open_reader(path)
