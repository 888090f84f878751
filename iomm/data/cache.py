"""Frozen encoders' outputs, kept between epochs and runs: the autoencoder's moments, the ViT's patch tokens.

    folder/<identity>/part-<id>.safetensors     rows of (L, C) by key, `feature_shards.py`

The key is the content hash of the image file together with the view, so a renamed, moved or re-packed image
is found again and a changed or differently cropped one is not. The identity stands for what else the outputs
depend on (weights, preprocessing, precision); another identity is another sub-folder. Parts are written whole
or not at all and never changed, so several ranks and runs may share the folder.

In memory are 12 bytes a row, and what is not yet written; rows are read as they are used, not mapped.

B samples of L tokens of C numbers; N rows of all parts.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iomm.data.feature_shards import SUFFIX, DamagedRow, Layout, Part, Row, TornPart, layout_of, write_part
from iomm.data.hashing import cache_key
from iomm.data.key_index import KeyIndex, heads
from iomm.data.stores import is_remote

__all__ = ["FeatureCache", "cache_key", "feature_key"]

PART_BYTES = 512 << 20  # a part is written when it has as much; it is held in memory until then
_READERS = 8  # threads that read rows
_MOST_AHEAD = 1024  # rows read ahead
_log = logging.getLogger(__name__)


def feature_key(content_hash: str, view: str) -> str:
    """Key of what is shown of an image: 32 hexadecimal digits."""
    return hashlib.sha256(f"{content_hash} {view}".encode()).hexdigest()[:32]


class FeatureCache:
    """Encoder outputs by key.

    What is `put` is found at once, and by other processes after `flush` here and `refresh` there. One thread
    uses it, but any may call `read_ahead`.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        outputs: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """Open, creating the sub-folder if there is none, and read the keys of every part.

        Args:
            folder: shared by all identities; on a file system of this machine.
            identity: name of the sub-folder, e.g. a hash of the encoder's weights and preprocessing.
            outputs: names of those that are wanted. Parts that lack one count as absent.
            dtype: in which values are kept; None: as they come.
            part_bytes: size of a part.

        Raises:
            ValueError: a folder in an object store, or an identity that is no plain folder name.
        """
        if is_remote(str(folder)):
            raise ValueError(
                f"the feature cache cannot lie in an object store ({folder}): it is written while training "
                "reads it. Set data.cache_dir to a folder of a file system that all ranks see."
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", identity):
            raise ValueError(
                f"cache identity {identity!r} must be a plain folder name of letters, digits, '.', '_' "
                "and '-'. Pass a hash in hex."
            )
        self.folder = Path(folder) / identity
        self.folder.mkdir(parents=True, exist_ok=True)
        self._outputs, self._dtype, self._part_bytes = tuple(outputs), dtype, part_bytes
        self._layout: Layout = {}
        self._parts: list[Part] = []
        self._seen: set[str] = set()  # names of parts, readable or not
        self._index = KeyIndex()
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._pending_bytes = 0
        self._damaged: set[tuple[Path, int]] = set()  # rows
        self._ahead: dict[str, Future[Row | None]] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="iomm-cache")
        self.refresh()

    def __len__(self) -> int:
        """Rows that can be found, a key that two parts have counted twice."""
        return len(self._index) + len(self._pending)

    @property
    def full(self) -> bool:
        """Whether the next `put` writes a part."""
        return self._pending_bytes >= self._part_bytes

    def refresh(self) -> None:
        """Find the parts that other processes wrote since; a torn one is left out, with a log warning."""
        paths = [path for path in self.folder.glob(f"part-*{SUFFIX}") if path.name not in self._seen]
        if paths:
            self._add(self._pool.map(_open, sorted(paths)))
            self._seen.update(path.name for path in paths)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that are not in the cache, each once, in order."""
        return [key for key in dict.fromkeys(keys) if not self._has(key)]

    def put(self, rows: Mapping[str, Row]) -> None:
        """Add rows: for each key its outputs by name, (L, C) each. Tensors are copied to the CPU; known keys
        are left as they are.

        A part that is full is written first. If that fails (a full disk), a warning is logged and its rows
        are given up: they will be encoded again.

        Raises:
            ValueError: other names, numbers in a token or dtypes than the rows already here. Nothing of the
                call is added then.
        """
        new = {key: self._kept(rows[key]) for key in self.missing(list(rows))}
        layout = self._layout
        for key, row in new.items():
            layout = layout or layout_of(row)
            self._check_layout(f"row {key}", layout_of(row), layout)
        if self.full:
            self._flush_or_give_up()
        self._layout = layout
        self._pending |= new
        self._pending_bytes += sum(value.nbytes for row in new.values() for value in row.values())

    def find(self, keys: Sequence[str]) -> dict[str, Row]:
        """The rows of those of `keys` that are here: by key, outputs by name, (L, C) each, on the CPU.

        A damaged row is not here, with a log warning.
        """
        wanted = list(dict.fromkeys(keys))
        readings = [self._ahead.pop(key, None) or self._pool.submit(self._read, key) for key in wanted]
        rows = {key: reading.result() for key, reading in zip(wanted, readings, strict=True)}
        # What was read ahead may have been put since.
        found = {key: row or self._read(key) for key, row in rows.items()}
        return {key: row for key, row in found.items() if row is not None}

    def read_ahead(self, key: str) -> None:
        """Begin to read a row that `find` will soon be asked for. May be called from any thread."""
        if len(self._ahead) < _MOST_AHEAD and key not in self._ahead:
            self._ahead[key] = self._pool.submit(self._read, key)

    def get(
        self, keys: Sequence[str], encode: Callable[[list[int]], Mapping[str, Tensor]], *, at_once: int = 1
    ) -> dict[str, Tensor]:
        """The outputs of a batch, stacked: by name (B, L, C), on the CPU, in the dtype they are kept in.

        Args:
            keys: of the B samples.
            encode: from positions in the batch to their outputs by name, (positions, L, C). Called for those
                that are not here, which are then put.
            at_once: positions a call. With 1 a value that is kept does not depend on which images happened
                to share its batch.

        Raises:
            ValueError: as in `put`.
        """
        rows = self.find(keys)
        absent = [keys.index(key) for key in dict.fromkeys(keys) if key not in rows]
        for first in range(0, len(absent), at_once):
            places = absent[first : first + at_once]
            encoded = {name: value.cpu() for name, value in encode(places).items()}
            self.put(
                {
                    keys[place]: {name: encoded[name][n] for name in self._outputs}
                    for n, place in enumerate(places)
                }
            )
            rows |= {keys[place]: self._pending[keys[place]] for place in places}
        return {name: torch.stack([rows[key][name] for key in keys]) for name in self._outputs}

    def flush(self) -> Path | None:
        """Write what was put since the last flush as one new part, and return its path; None if there is
        nothing.

        Raises:
            OSError: the part could not be written (a full disk). The rows stay in memory and in the next
                flush.
        """
        if not self._pending:
            return None
        name = hashlib.sha256("".join(self._pending).encode()).hexdigest()[:24]
        path = self.folder / f"part-{name}{SUFFIX}"
        write_part(path, self._pending)
        self._seen.add(path.name)
        self._add([_open(path)])
        self._pending, self._pending_bytes = {}, 0
        return path

    def _flush_or_give_up(self) -> None:
        try:
            self.flush()
        except OSError as error:
            _log.warning(
                "feature cache %s: a part could not be written (%s); its %d samples will be encoded again.",
                self.folder,
                error,
                len(self._pending),
            )
            self._pending, self._pending_bytes = {}, 0

    def _add(self, opened: Iterable[tuple[Part, NDArray[np.uint64]] | None]) -> None:
        """Take parts in that were opened, with the heads of their keys."""
        new: list[NDArray[np.uint64]] = []
        for part, head_N in filter(None, opened):
            if lacking := [name for name in self._outputs if name not in part.layout]:
                _log.info("feature cache: %s has no %s, left out", part.path, ", ".join(lacking))
                continue
            wanted = {name: part.layout[name] for name in self._outputs}
            self._layout = self._layout or wanted
            self._check_layout(str(part.path), wanted, self._layout)
            self._parts.append(part)
            new.append(head_N)
        self._index.add(new)

    def _has(self, key: str) -> bool:
        return key in self._pending or any(True for _ in self._places(key))

    def _places(self, key: str) -> Iterator[tuple[Part, int]]:
        """Where a key stands, undamaged as far as is known; in several parts if several ranks encoded it."""
        for p, n in self._index.find(key):
            part = self._parts[p]
            if (part.path, n) in self._damaged:
                continue
            try:
                if part.key(n) == key:
                    yield part, n
            except DamagedRow as error:
                self._note_damage(part, n, error)

    def _read(self, key: str) -> Row | None:
        if (row := self._pending.get(key)) is not None:
            return row
        for part, n in self._places(key):
            try:
                return part.read(n, self._outputs)
            except DamagedRow as error:
                self._note_damage(part, n, error)
        return None

    def _note_damage(self, part: Part, n: int, error: DamagedRow) -> None:
        self._damaged.add((part.path, n))
        _log.warning("feature cache: %s. Unless another part has it, the sample is encoded again.", error)

    def _kept(self, row: Row) -> dict[str, Tensor]:
        return {
            name: value.detach().to("cpu", self._dtype or value.dtype, copy=True).contiguous()
            for name, value in row.items()
        }

    def _check_layout(self, what: str, found: Layout, expected: Layout) -> None:
        if found != expected:
            raise ValueError(
                f"feature cache {self.folder}: {what} has outputs {_describe(found)}, the others "
                f"{_describe(expected)}. One identity has one layout: let the identity name what differs."
            )


def _open(path: Path) -> tuple[Part, NDArray[np.uint64]] | None:
    """A part, and the first half of each of its keys, (N,)."""
    try:
        part, keys_N = Part.open(path)
        return part, heads(keys_N)
    except TornPart as error:
        what = "feature cache: ignored %s: torn or damaged: %s. Its samples are encoded again."
        _log.warning(what, path, error)
        return None


def _describe(layout: Layout) -> str:
    return ", ".join(f"{name} (L, {c}) {dtype}" for name, (dtype, c) in sorted(layout.items())) or "none"
