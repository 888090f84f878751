"""Single tensors in and out of torch_dist and safetensors."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from iomm.checkpoint.folder import CheckpointError
from iomm.checkpoint.streaming import (
    SafetensorsReader,
    ShardedReader,
    Spec,
    write_safetensors,
    write_sharded,
)

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b.half": torch.arange(5).to(torch.bfloat16),
    "c": torch.tensor(7.5, dtype=torch.float64),
    "d": torch.arange(4),
}
SPECS = {name: Spec(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


def test_sharded_tensors_come_back_one_at_a_time(tmp_path):
    asked = Counter()

    def get(name):
        asked[name] += 1
        return TENSORS[name]

    write_sharded(tmp_path, SPECS, get)
    reader = ShardedReader(tmp_path)
    assert asked == dict.fromkeys(TENSORS, 1)
    assert reader.specs == SPECS
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:The argument order of load:UserWarning")
def test_megatron_reads_what_is_written(tmp_path, mesh):
    from megatron.core import dist_checkpointing

    from iomm.parallel.weights import sharded

    write_sharded(tmp_path, SPECS, TENSORS.__getitem__)
    targets = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    loaded = dist_checkpointing.load(dict(sharded(targets, TENSORS, "", mesh)), str(tmp_path))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("shard_bytes", [10**9, 30])
def test_safetensors_are_what_the_library_reads(tmp_path, shard_bytes):
    write_safetensors(tmp_path, "model", SPECS, TENSORS.__getitem__, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 100 else 3)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    reader = SafetensorsReader(tmp_path)
    assert reader.specs == SPECS
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in TENSORS.items())


def test_a_missing_shard_and_a_torn_file_are_errors(tmp_path):
    write_safetensors(tmp_path, "model", SPECS, TENSORS.__getitem__, 30)
    torn = tmp_path / "model-00001-of-00003.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        SafetensorsReader(tmp_path)
    torn.unlink()
    with pytest.raises(CheckpointError, match="misses files that its index names: model-00001-of-00003"):
        SafetensorsReader(tmp_path)


def test_an_index_cannot_name_files_outside_its_folder(tmp_path):
    index = {"weight_map": {"a": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="misses files"):
        SafetensorsReader(tmp_path)


def test_two_weight_files_without_an_index_are_ambiguous(tmp_path):
    for stem in ("one", "two"):
        write_safetensors(tmp_path, stem, SPECS, TENSORS.__getitem__)
    with pytest.raises(CheckpointError, match="several weight files and no index"):
        SafetensorsReader(tmp_path)
