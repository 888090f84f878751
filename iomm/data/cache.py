"""Frozen encoders' outputs, kept between epochs and runs: latents, ViT features.

    folder/<identity>/part-<id>.safetensors     each output stacked over the part's samples: (N, ...)

The key is the content hash of the image file, so a renamed, moved or re-packed image is found again and a
changed one is not. The identity stands for everything else that the outputs depend on (weights, resolution,
preprocessing); another identity is another sub-folder. Parts are written whole or not at all and never
changed, so several ranks may share the folder.

B is the number of samples asked for.
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from iomm.data.hashing import cache_key

__all__ = ["FeatureCache", "cache_key"]

_log = logging.getLogger(__name__)


class FeatureCache:
    """Outputs by content hash. All of it is in memory after opening; size the host for that.

    `put` is seen by `get` at once and by other processes after `flush` here and `refresh` there.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Open, creating the sub-folder if there is none, and read every part.

        Args:
            folder: shared by all identities.
            identity: name of the sub-folder, e.g. a hash of the encoders' weights and preprocessing.

        Raises:
            ValueError: an identity that is no plain folder name.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", identity):
            raise ValueError(
                f"cache identity {identity!r} must be a plain folder name of letters, digits, '.', '_' "
                "and '-'. Pass a hash in hex."
            )
        self.folder = Path(folder) / identity
        self.folder.mkdir(parents=True, exist_ok=True)
        self._entries: dict[str, dict[str, Tensor]] = {}
        self._pending: list[str] = []
        self._read_parts: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def refresh(self) -> None:
        """Read the parts that other processes wrote since; a torn one is left out, with a log warning."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name in self._read_parts:
                continue
            self._read_parts.add(path.name)
            try:
                part = _read_part(path)
            except _TornPart as error:
                _log.warning("feature cache: ignored %s: %s. Its samples are encoded again.", path, error)
                continue
            self._check_layout(part)
            self._entries = part | self._entries

    def missing(self, hashes: Sequence[str]) -> list[str]:
        """Those of `hashes` that are not in the cache, each once, in order."""
        return [hash_ for hash_ in dict.fromkeys(hashes) if hash_ not in self._entries]

    def put(self, outputs_by_hash: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add samples: for each content hash its outputs by name. Tensors are copied to the CPU; known hashes
        are left as they are.

        Raises:
            ValueError: other names, shapes or dtypes than the samples already here. Nothing of the call is
                added then.
        """
        new = {hash_: outputs_by_hash[hash_] for hash_ in self.missing(list(outputs_by_hash))}
        self._check_layout(new)
        for hash_, outputs in new.items():
            self._entries[hash_] = {
                name: value.detach().to("cpu", copy=True).contiguous() for name, value in outputs.items()
            }
            self._pending.append(hash_)

    def get(self, hashes: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of samples, by name: each of shape (B, ...), on the CPU, a copy.

        Raises:
            KeyError: a hash that is not in the cache.
            ValueError: no hash given.
        """
        if not hashes:
            raise ValueError("no content hash was given; a batch has at least one sample.")
        if absent := self.missing(hashes):
            raise KeyError(
                f"{len(absent)} of {len(hashes)} samples are not in the feature cache {self.folder}, such "
                f"as {absent[0]}. "
                "Encode what missing() lists and put() it first."
            )
        rows = [self._entries[hash_] for hash_ in hashes]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def flush(self) -> Path | None:
        """Write what was put since the last flush as one new part, and return its path; None if there is
        nothing.

        Raises:
            OSError: the part could not be written (a full disk). The samples stay in memory and in the next
                flush.
        """
        if not self._pending:
            return None
        stacked = self.get(self._pending)
        name = hashlib.sha256("".join(self._pending).encode()).hexdigest()[:24]
        path = self.folder / f"part-{name}.safetensors"
        hashes = json.dumps(self._pending)
        _write_atomically(path, save(stacked, {"hashes": hashes, "crc32": _checksum(hashes, stacked)}))
        self._read_parts.add(path.name)
        self._pending = []
        return path

    def _check_layout(self, samples: Mapping[str, Mapping[str, Tensor]]) -> None:
        expected = _layout(next(iter((self._entries or samples).values()), {}))
        for hash_, outputs in samples.items():
            if (layout := _layout(outputs)) != expected:
                raise ValueError(
                    f"feature cache {self.folder}: sample {hash_} has outputs {_describe(layout)}, the "
                    "others "
                    f"{_describe(expected)}. One identity has one layout: let the identity name what differs."
                )


_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class _TornPart(Exception):
    pass


def _layout(outputs: Mapping[str, Tensor]) -> _Layout:
    return {name: (tuple(value.shape), value.dtype) for name, value in outputs.items()}


def _describe(layout: _Layout) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in sorted(layout.items())) or "none"


def _checksum(hashes: str, stacked: Mapping[str, Tensor]) -> str:
    """CRC-32 over the hashes and all outputs in order of name.

    A file of the right length can still hold zeros after a power cut.
    """
    value = zlib.crc32(hashes.encode())
    for name in sorted(stacked):
        value = zlib.crc32(stacked[name].contiguous().flatten().view(torch.uint8).numpy().data, value)
    return str(value)


def _read_part(path: Path) -> dict[str, dict[str, Tensor]]:
    """Samples of one part by content hash.

    Raises:
        _TornPart: incomplete or damaged.
    """
    try:
        with safe_open(path, framework="pt") as part:
            metadata = part.metadata() or {}
            # A copy, because the reader maps the file: a part must not change under us once it is checked.
            stacked: dict[str, Tensor] = {name: part.get_tensor(name).clone() for name in part.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _TornPart(f"torn or unreadable ({error})") from error
    hashes = metadata.get("hashes", "")
    if metadata.get("crc32") != _checksum(hashes, stacked):
        raise _TornPart("torn or damaged (its checksum does not match its contents)")
    return {
        hash_: {name: rows[i] for name, rows in stacked.items()} for i, hash_ in enumerate(json.loads(hashes))
    }


def _write_atomically(path: Path, data: bytes) -> None:
    """Put a whole file in place, or nothing. The process number keeps two writers of one part apart."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
