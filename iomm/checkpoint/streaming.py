"""Tensors one at a time, in and out of both formats, so that a conversion holds little more than its largest
tensor.

torch_dist (a checkpoint of ours, Megatron's sharded format) and safetensors (Hugging Face), each with a
reader that fetches single tensors and a writer that asks for them when their turn comes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from iomm.checkpoint.contents import ContentsReader
from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.ranks import quiet

Get = Callable[[str], Tensor]
SHARD_BYTES = 1_000_000_000
# What safetensors calls the types that weights come in.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardedReader:
    """Single tensors of a torch_dist checkpoint, whatever layout wrote it. `specs` lists them."""

    def __init__(self, path: Path) -> None:
        self._reader = ContentsReader(path)
        contents = self._reader.read_metadata().state_dict_metadata
        self.specs = {
            name: Spec(tuple(entry.size), entry.properties.dtype)
            for name, entry in contents.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def get(self, name: str) -> Tensor:
        """The whole tensor, in its stored type."""
        spec = self.specs[name]
        state = {name: torch.empty(spec.shape, dtype=spec.dtype)}
        with quiet():
            state_dict_loader.load(state, storage_reader=self._reader, no_dist=True)
        return state[name]


class _LazyPlanner(DefaultSavePlanner):
    """Asks for a tensor when it is written; the state dict holds tensors without data."""

    def __init__(self, get: Get) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._get = get

    @override
    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        name, spec = write_item.index.fqn, self.state_dict[write_item.index.fqn]
        return _checked(name, self._get(name), Spec(tuple(spec.shape), spec.dtype)).detach().contiguous()


def write_sharded(folder: Path, specs: Mapping[str, Spec], get: Get) -> None:
    """Write a torch_dist checkpoint that Megatron's loader reads, a file a tensor: torch's writer keeps what
    it writes into one file in memory until that file is done.

    Args:
        folder: exists; tensors, table of contents and Megatron's marker are written into it.
        get: gives a tensor of the declared shape and type; called once for each, in any order.
    """
    state: dict[str, Any] = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()
    }
    # Where Megatron 0.19 looks for what is no tensor: nothing here, but its loader asks.
    state["common_state/shard_0_1"] = [{}]
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1, sync_files=True)
    with quiet():
        state_dict_saver.save(state, storage_writer=writer, planner=_LazyPlanner(get), no_dist=True)
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )


class SafetensorsReader:
    """Single tensors of a folder's safetensors files. `specs` lists them.

    The library checks the files; the numbers are read here, because its tensors are views of a mapping of the
    whole file, whose pages would add up.

    Raises:
        CheckpointError: no weights, weights as a pickle, a damaged file, or a shard that the index names and
            that is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs: dict[str, Spec] = {}
        self._place: dict[str, tuple[Path, int]] = {}  # file, offset of the first byte
        for file in _weight_files(folder):
            try:
                with safe_open(str(file), framework="pt"):
                    pass
                self._read_header(file)
            except SafetensorError as error:
                raise CheckpointError(f"{file} is no complete safetensors file: {error}.") from error
            except KeyError as error:
                raise CheckpointError(f"{file} has weights of type {error}, which is not read.") from error

    def _read_header(self, file: Path) -> None:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                self.specs[name] = Spec(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
                self._place[name] = (file, 8 + length + entry["data_offsets"][0])

    def get(self, name: str) -> Tensor:
        """The tensor, in its stored type."""
        spec, (file, offset) = self.specs[name], self._place[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        with file.open("rb", buffering=0) as opened:
            opened.seek(offset)
            target = raw_bytes(tensor)
            while target:  # one read gives at most 2 GB
                count = opened.readinto(target)
                if not count:
                    raise CheckpointError(f"{file} ends in the middle of {name}.")
                target = target[count:]
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder} has several indices of weights: {', '.join(map(str, indices))}.")
    if indices:
        index: dict[str, str] = json.loads(indices[0].read_text())["weight_map"]
        files = [folder / name for name in sorted(set(index.values()))]
        missing = [file.name for file in files if file.parent != folder or not file.is_file()]
        if missing:
            raise CheckpointError(f"{folder} misses files that its index names: {', '.join(missing)}.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(no_weights(folder))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder} has several weight files and no index: {names}. Keep one.")
    return files


def no_weights(folder: Path) -> str:
    """Why a folder without safetensors cannot be read."""
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        return (
            f"{folder} has its weights as a pickle ({', '.join(pickles)}). Loading one runs whatever code is "
            "in it, so only safetensors are read. Convert it where you trust it: save_pretrained(..., "
            "safe_serialization=True)."
        )
    return f"{folder} has no weights: there is no *.safetensors file in it."


def write_safetensors(
    folder: Path, stem: str, specs: Mapping[str, Spec], get: Get, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `stem`.safetensors, or numbered shards with an index where it would exceed `shard_bytes`.

    Args:
        get: gives a tensor of the declared shape and type; called once for each, in order.
    """
    shards = _split(specs, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", shards[0], get)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, get)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(specs: Mapping[str, Spec], shard_bytes: int) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _write_file(path: Path, specs: Mapping[str, Spec], get: Get) -> None:
    """safetensors: 8 bytes of header length, a JSON header padded to 8 bytes, the tensors' bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, spec in specs.items():
            file.write(raw_bytes(_checked(name, get(name), spec)))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as they lie in memory, without a copy if it is contiguous."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checked(name: str, tensor: Tensor, spec: Spec) -> Tensor:
    assert tuple(tensor.shape) == spec.shape, f"{name}: {tuple(tensor.shape)} instead of {spec.shape}"
    return tensor.to(spec.dtype)


def total_bytes(specs: Iterable[Spec]) -> int:
    """What tensors take on disk."""
    return sum(spec.nbytes for spec in specs)
