"""Folders of others: FLUX.1 with what it has and ours has not, and everything that can be wrong with one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from iomm.checkpoint.hf import import_folder, verify
from iomm.checkpoint.hf_run import RunWeights
from iomm.checkpoint.names import our_config
from iomm.checkpoint.sharded import CheckpointError
from tests.small_run import small_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """A small FLUX.1-dev as diffusers saves it: pooled input, guidance embedding."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def config(flux, world, tmp_path):
    """A run that trains it."""
    made = small_config(world, tmp_path)
    generator = our_config(json.loads((flux / "transformer" / "config.json").read_text()))
    return dataclasses.replace(made, generator=generator)


def copy_with(flux: Path, folder: Path, change) -> Path:
    """The folder with changed tensors."""
    target = folder / "changed" / "transformer"
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((flux / "transformer" / "config.json").read_bytes())
    tensors = load_file(flux / "transformer" / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target.parent


def test_a_flux_folder_becomes_a_checkpoint_with_a_fresh_query_adapter(flux, config, tmp_path, mesh):
    imported = import_folder(flux, tmp_path / "run", config=config)
    (note,) = imported.notes
    assert "no query adapter" in note
    assert "random weights of seed 0" in note
    report = verify(flux, tmp_path / "run")
    assert report.equal, report.text()
    again = import_folder(flux, tmp_path / "other", config=config, seed=1)
    name = "conditioner.adapter.queries"
    first, second = (RunWeights(i.checkpoint, ema=False).get(name) for i in (imported, again))
    assert first.std() > 0
    assert not torch.equal(first, second)


def test_a_folder_of_others_needs_a_configuration(flux, tmp_path):
    with pytest.raises(CheckpointError, match=r"was not exported by iomm.*--config CONFIG\.py"):
        import_folder(flux, tmp_path / "run")


def test_every_setting_of_another_generator_is_listed(flux, world, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        import_folder(flux, tmp_path / "run", config=small_config(world, tmp_path))
    for line in (
        "double_blocks is 2, in the folder 1",
        "single_blocks is 0, in the folder 1",
        "pooled_width is None, in the folder 6",
    ):
        assert line in str(caught.value)


def test_missing_extra_and_wrongly_shaped_tensors_are_all_listed_and_nothing_is_left(flux, config, tmp_path):
    def change(tensors):
        del tensors["proj_out.bias"], tensors["x_embedder.weight"]
        tensors["lora.weight"] = torch.zeros(2)
        tensors["context_embedder.bias"] = torch.zeros(3)

    folder = copy_with(flux, tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        import_folder(folder, tmp_path / "run", config=config)
    for line in (
        "transformer misses proj_out.bias (64,)",
        "transformer misses x_embedder.weight (32, 64)",
        "transformer has lora.weight (2,), which does not belong",
        "transformer has context_embedder.bias of shape (3,), which must be (32,)",
    ):
        assert line in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_failure_in_mid_write_leaves_no_run(flux, config, tmp_path):
    def change(tensors):  # their q, k, v of one weight in two types
        name = "transformer_blocks.0.attn.to_k.weight"
        tensors[name] = tensors[name].half()

    folder = copy_with(flux, tmp_path, change)
    with pytest.raises(ValueError, match="convert them to one dtype"):
        import_folder(folder, tmp_path / "run", config=config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["changed"]


def test_a_pickle_is_refused_with_the_reason(flux, config, tmp_path):
    target = tmp_path / "pickled" / "transformer"
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((flux / "transformer" / "config.json").read_bytes())
    (target / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="runs whatever code is in it, so only safetensors are read"):
        import_folder(target.parent, tmp_path / "run", config=config)


def test_bf16_weights_stay_bf16(flux, config, tmp_path):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    folder = copy_with(flux, tmp_path, change)
    import_folder(folder, tmp_path / "run", config=config)
    weights = RunWeights(tmp_path / "run", ema=False)
    assert weights.spec("generator.single_blocks.0.qkv.weight").dtype == torch.bfloat16
    assert verify(folder, tmp_path / "run", outputs=False).equal
