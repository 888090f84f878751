"""The table of names: complete, exact both ways, one row's tensors at a time, sliced as the layers are."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iomm.checkpoint import names_flux
from iomm.checkpoint.name_table import Columns, Interleave, Permute, Row, Table
from iomm.checkpoint.names import family_table, our_config, their_config
from iomm.config import GeneratorConfig
from tests.model.small_models import make
from tests.model.test_mmdit import SMALL

FLUX_DEV = dataclasses.replace(SMALL, pooled_width=6, guidance_embedding=True)
ALL_DOUBLE = dataclasses.replace(SMALL, single_blocks=0, predict="clean")
FLUX = [SMALL, FLUX_DEV, ALL_DOUBLE]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]

# transformer/config.json as FLUX.1-dev's folder has it: without the settings that came later.
DEV_FOLDER: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def random_weights(table: Table, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in table.ours.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("config", FLUX, ids=["ours", "dev", "double"])
def test_the_table_names_every_tensor_of_both_models_with_its_shape(config: GeneratorConfig) -> None:
    table = family_table(config)
    with torch.device("meta"):
        ours, theirs = make(config), FluxTransformer2DModel.from_config(their_config(config))
    assert table.ours == shapes(ours)
    assert table.theirs == shapes(theirs)


def test_flux_dev_has_its_twelve_billion_weights() -> None:
    config = our_config(DEV_FOLDER)
    table = family_table(config)
    with torch.device("meta"):
        assert table.theirs == shapes(FluxTransformer2DModel.from_config(DEV_FOLDER))
    assert sum(torch.Size(shape).numel() for shape in table.ours.values()) == 11_901_408_320
    assert (config.pooled_width, config.guidance_embedding, config.condition_width) == (768, True, 4096)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", FLUX, ids=["ours", "dev", "double"])
def test_there_and_back_keeps_every_bit(config: GeneratorConfig, dtype: torch.dtype) -> None:
    table = family_table(config)
    ours = random_weights(table, dtype)
    theirs = {name: table.to_theirs(name, ours.__getitem__) for name in table.theirs}
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in theirs.values())
    back = {name: table.to_ours(name, theirs.__getitem__) for name in table.ours}
    assert all(torch.equal(bits(back[name]), bits(ours[name])) for name in ours)


def test_a_tensor_is_made_of_the_few_it_says_it_needs_and_asks_for_no_other() -> None:
    table = family_table(SMALL)
    ours = random_weights(table)
    theirs: dict[str, Tensor] = {}
    for name in table.theirs:
        needed = {n: ours[n] for n in table.needs_ours(name)}
        assert len(needed) <= 2
        theirs[name] = table.to_theirs(name, needed.__getitem__)
    for name in table.ours:
        needed = {n: theirs[n] for n in table.needs_theirs(name)}
        assert len(needed) <= 3
        table.to_ours(name, needed.__getitem__)
    assert table.needs_theirs("single_blocks.0.mlp_out.weight") == [
        "single_transformer_blocks.0.proj_out.weight"
    ]
    assert table.needs_ours("transformer_blocks.1.attn.to_v.bias") == ["double_blocks.1.image.qkv.bias"]


@pytest.mark.parametrize("config", FLUX, ids=["ours", "dev", "double"])
def test_tensors_are_sliced_along_the_dimension_that_the_layers_share(config: GeneratorConfig) -> None:
    table, weights = family_table(config), random_weights(family_table(config))
    for name, parameter in make(config).named_parameters():
        split = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        assert table.partition_dim(name) == split, name
        parts = [table.slice(name, weights[name], rank, 2) for rank in range(2)]
        whole = parts[0] if split is None else torch.cat(parts, split)
        assert torch.equal(whole, weights[name])


def test_a_ranks_slice_of_the_fused_projection_holds_whole_heads() -> None:
    table, name = family_table(SMALL), "double_blocks.0.image.qkv.weight"
    ours = random_weights(table)
    theirs = [table.to_theirs(n, ours.__getitem__) for n in table.needs_theirs(name)]
    head = SMALL.hidden_size // SMALL.heads
    for rank in range(2):
        heads = [part[rank * head : (rank + 1) * head] for part in theirs]
        assert torch.equal(table.slice(name, ours[name], rank, 2), torch.cat(heads))


@pytest.mark.parametrize("config", FLUX, ids=["ours", "dev", "double"])
def test_the_stock_configuration_returns_as_ours_and_is_known_to_the_stock_class(
    config: GeneratorConfig,
) -> None:
    theirs = their_config(config)
    assert our_config(theirs) == config
    used, unused, hidden = FluxTransformer2DModel.extract_init_dict(dict(theirs))
    assert unused == {}  # anything here is a warning on every load
    assert used.keys() == names_flux.DEFAULTS.keys()
    assert hidden.keys() == {"_class_name", names_flux.OURS_KEY}


def test_settings_that_a_folder_leaves_out_are_the_stock_classes_defaults() -> None:
    arguments = inspect.signature(FluxTransformer2DModel.__init__).parameters
    defaults = {name: p.default for name, p in arguments.items() if name != "self"}
    assert defaults == names_flux.DEFAULTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel.*FluxTransformer2DModel"),
        ({"in_channels": 384, "out_channels": 64}, "in_channels 384 and out_channels 64"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"_iomm": {"pooled_width": 5}}, "pooled_projection_dim 768.*pooled_width 5"),
        ({"_iomm": {"colour": 5}}, "colour under _iomm"),
    ],
)
def test_a_configuration_that_ours_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        our_config(DEV_FOLDER | change)


@pytest.mark.parametrize("change", [{"mlp_ratio": 2.0}, {"rope_theta": 256.0}])
def test_a_model_that_the_stock_class_cannot_be_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*built in"):
        their_config(dataclasses.replace(SMALL, **change))


def test_shapes_dtypes_and_names_that_do_not_fit_are_refused() -> None:
    table = family_table(SMALL)
    theirs = {name: torch.zeros(shape) for name, shape in table.theirs.items()}
    name, parts = "double_blocks.0.image.qkv.weight", table.needs_theirs("double_blocks.0.image.qkv.weight")
    with pytest.raises(ValueError, match=r"to_k.weight has shape \(4, 4\).*\(32, 32\)"):
        table.to_ours(name, (theirs | {parts[1]: torch.zeros(4, 4)}).__getitem__)
    with pytest.raises(ValueError, match=r"to_v.weight is torch.float16, .*to_q.weight is torch.float32"):
        table.to_ours(name, (theirs | {parts[2]: theirs[parts[2]].half()}).__getitem__)
    with pytest.raises(
        ValueError, match="no tensor double_blocks.0.image.qvk.weight.*Did you mean .*qkv.weight"
    ):
        table.to_ours("double_blocks.0.image.qvk.weight", theirs.__getitem__)
    with pytest.raises(ValueError, match=r"96 entries.*do not divide over 5"):
        table.slice(name, torch.zeros(96, 32), 0, 5)


def test_pooled_weights_that_are_not_zero_are_refused_by_a_model_without_pooled_input() -> None:
    table = family_table(SMALL)
    assert set(table.constants.values()) == {0.0} and not family_table(FLUX_DEV).constants
    for name, shape in table.theirs.items():
        table.check_constant(name, torch.zeros(shape))
        if name in table.constants:
            with pytest.raises(ValueError, match=f"{name} is not 0 all over"):
                table.check_constant(name, torch.full(shape, 1e-30))
        else:
            table.check_constant(name, torch.ones(shape))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.data())
def test_every_relation_is_a_bijection(groups: int, group: int, parts: int, data: st.DataObject) -> None:
    rows, width = groups * group * parts, data.draw(st.integers(1, 4))
    order = tuple(data.draw(st.permutations(range(rows))))
    names = tuple(f"theirs{i}" for i in range(parts))
    wide = ((rows, width), (rows, 2 * width))
    table = Table(
        (
            Row(("fused",), names, ((rows, width),), Interleave(group, parts)),
            Row(("left", "right"), ("side by side",), wide, Columns()),
            Row(("reordered",), ("in order",), ((rows, width),), Permute(0, order)),
        )
    )
    ours = {n: torch.randn(shape) for n, shape in table.ours.items()}
    theirs = {n: table.to_theirs(n, ours.__getitem__) for n in table.theirs}
    assert {n: tuple(t.shape) for n, t in theirs.items()} == table.theirs
    assert all(torch.equal(table.to_ours(n, theirs.__getitem__), ours[n]) for n in ours)
    assert torch.equal(ours["reordered"], theirs["in order"][list(order)])
