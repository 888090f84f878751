"""Reads a torch_dist checkpoint without running what is in it.

torch's reader unpickles two things that a checkpoint's author could fill with code:

    .metadata       the table of contents: which tensor lies in which bytes of which file
    byte objects    what is no tensor: Megatron's common state

Both are read here as data. In the table of contents every class and function that the pickle names becomes a
blank record, made for this one reading, that keeps what it is given and does nothing; torch's own classes are
then made from the numbers and strings in the records. Byte objects are read with `weights_only` and must be
plain values; torch gets a fresh pickle of those.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final, override

import torch
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from iomm.checkpoint.folder import DamagedCheckpoint

TABLE = ".metadata"
# Where the names in a table of contents come from. Others are refused, though they would do nothing either.
_MODULES = ("torch", "torch.serialization", "pathlib", "pathlib._local")
_PACKAGE = "torch.distributed.checkpoint."


class _Record:
    """What the pickle would have made an object of: the arguments and the state, kept and not used."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


@final
class _Records(pickle.Unpickler):
    """An unpickler that knows no class and no function, only records of their names."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._types: dict[str, type[_Record]] = {}

    @override
    def find_class(self, module: str, name: str) -> type[_Record]:
        if module not in _MODULES and not module.startswith(_PACKAGE):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of contents needs")
        full = f"{module}.{name}"
        return self._types.setdefault(full, type("Record", (_Record,), {"name": full}))


def read_contents(folder: Path) -> Metadata:
    """The table of contents of a checkpoint, in torch's form.

    Raises:
        DamagedCheckpoint: missing, or anything but a table of contents; nothing in it was run.
    """
    path = folder / TABLE
    try:
        root = _Records(path.read_bytes()).load()
        return _contents(_state(root, "metadata.Metadata"), folder)
    except Exception as error:  # whatever is wrong with it, the checkpoint cannot be read
        raise DamagedCheckpoint(
            f"{path} is not the table of contents of a checkpoint: {error}. Nothing in it was run. Use "
            "another checkpoint, from somebody you trust."
        ) from error


def _contents(table: Mapping[str, Any], folder: Path) -> Metadata:
    entries: dict[str, Any] = {}
    for key, entry in table["state_dict_metadata"].items():
        is_tensor = isinstance(entry, _Record) and entry.name.endswith(".TensorStorageMetadata")
        entries[_text(key)] = _tensor(entry) if is_tensor else BytesStorageMetadata()
    places = dict(_place(index, place, folder) for index, place in table["storage_data"].items())
    return Metadata(state_dict_metadata=entries, storage_data=places)


def _tensor(entry: _Record) -> TensorStorageMetadata:
    state = _state(entry, "metadata.TensorStorageMetadata")
    dtype = _state(state["properties"], "metadata.TensorProperties")[0]
    chunks = (_state(chunk, "metadata.ChunkStorageMetadata") for chunk in state["chunks"])
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_dtype(dtype)),
        size=_size(state["size"]),
        chunks=[ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _place(index: Any, place: Any, folder: Path) -> tuple[MetadataIndex, _StorageInfo]:
    """Which bytes of which file hold a piece. Only files of the checkpoint, stored as they are."""
    what, where = _state(index, "metadata.MetadataIndex"), _state(place, "filesystem._StorageInfo")
    file = _text(where["relative_path"])
    if not file or file != Path(file).name or file.startswith("."):
        raise ValueError(f"it points to {file}, which is no file in {folder}")
    if where.get("transform_descriptors"):
        raise ValueError(f"it wants {file} transformed by {where['transform_descriptors']}")
    offset, hint = what.get("offset"), what.get("index")
    piece = MetadataIndex(
        _text(what["fqn"]), None if offset is None else _size(offset), None if hint is None else _count(hint)
    )
    return piece, _StorageInfo(file, _count(where["offset"]), _count(where["length"]))


def _state(record: Any, name: str) -> Any:
    if not isinstance(record, _Record) or record.name != _PACKAGE + name:
        raise ValueError(f"it has {type(record).__name__} {getattr(record, 'name', record)!r} for {name}")
    return record.state


def _dtype(record: Any) -> torch.dtype:
    name = getattr(record, "name", "")
    dtype = getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"it has {name or record!r} for a type of numbers")
    return dtype


def _size(record: Any) -> torch.Size:
    if not isinstance(record, _Record) or record.name != "torch.Size":
        raise ValueError(f"it has {record!r} for a shape")
    return torch.Size(_count(number) for number in (record.args[0] if record.args else ()))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"it has {value!r} for a number of bytes or elements")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"it has {value!r} for a name")
    return value


@final
class ContentsReader(FileSystemReader):
    """torch's reader of a checkpoint's folder, which unpickles nothing that came with it. Reads the table of
    contents once."""

    _contents: Metadata | None = None

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._contents is None:
            self._contents = read_contents(Path(self.path))
        self._contents.storage_meta = StorageMeta(load_id=self.load_id)
        return self._contents

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._plain_bytes(item))
        return super().read_data(LoadPlan(tensors), planner)

    def _plain_bytes(self, item: ReadItem) -> io.BytesIO:
        """A pickle of the same plain values, of our own making: the planner unpickles whatever it gets."""
        place = self.storage_data[item.storage_index]
        file, name = Path(self.path) / place.relative_path, item.storage_index.fqn
        with file.open("rb") as opened:
            opened.seek(place.offset)
            stored = io.BytesIO(opened.read(place.length))
        try:
            values = torch.load(stored, map_location="cpu", weights_only=True)
            strange = next(_strange(values), None)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            first_line = str(error).partition("\n")[0].rstrip(".")
            raise DamagedCheckpoint(f"{name} in {file} is no plain data: {first_line}.") from error
        if strange is not None:
            raise DamagedCheckpoint(f"{name} in {file} holds a {strange}; only plain data is read.")
        fresh = io.BytesIO()
        torch.save(values, fresh)
        fresh.seek(0)
        return fresh


def _strange(value: Any) -> Iterator[str]:
    """Types among the values that are not plain."""
    if type(value) is dict:
        for key, inner in value.items():
            yield from _strange(key)
            yield from _strange(inner)
    elif type(value) in (list, tuple):
        for inner in value:
            yield from _strange(inner)
    elif value is not None and type(value) not in (str, int, float, bool):
        yield type(value).__name__
