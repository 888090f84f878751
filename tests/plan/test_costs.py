"""FLOPs by formula against a count of the operators that really run, on the meta device or small shapes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from iomm.conditioning.adapter import ResidualQueryAdapter
from iomm.conditioning.connector import Connector
from iomm.config import Fp8Config, ParallelConfig
from iomm.flow.path import grid_positions
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.mesh import Mesh
from iomm.plan.costs import (
    adapter_items,
    codec_item,
    condition_items,
    connector_items,
    generator_items,
    image_items,
    input_gradient,
    lm_item,
    vit_item,
)
from iomm.plan.elementwise import lm_layer
from iomm.plan.shapes import FLUX_VAE, INTERNVL3_2B
from iomm.plan.workload import varied, workload
from iomm.presets import b, xl
from iomm.system import FAMILIES
from tests.plan.encoders import codec_of, lm_of, text_config, vision_config
from tests.plan.small_plans import small_work

B = workload(b("b", images=("images",)))


def counted(call) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter:
        out = call()
    return counter.get_total_flops(), out


def backward_of(out: torch.Tensor) -> int:
    return counted(lambda: out.backward(torch.empty_like(out)))[0]


def close(formula: float, count: float) -> None:
    assert formula == pytest.approx(count, rel=0.01)


def flops(items, *names: str) -> float:
    """Of the items whose name starts like one of these."""
    return sum(item.flops for item in items if item.name.startswith(names))


# The published widths with two blocks of each kind, so that a test takes a second.
SHALLOW = {
    "flux": {"generator__double_blocks": 2, "generator__single_blocks": 2},
    "flux, double blocks only": {"generator__double_blocks": 2},
    "z_image": {"generator__single_blocks": 2, "generator__refiner_blocks": 1},
}


@pytest.mark.parametrize("name", SHALLOW)
def test_generator_forward_and_backward(name, mesh: Mesh):
    preset = xl if name == "z_image" else b
    work = varied(workload(preset("plan", images=("images",))), **SHALLOW[name])
    config = work.config.generator
    parallel = ParallelConfig()
    with torch.device("meta"):
        made = transformer_config(config.hidden_size, config.heads, torch.bfloat16, mesh, parallel)
        model: nn.Module = FAMILIES[config.family](config, Layers(made, mesh))
        condition = torch.empty(1, 256, config.condition_width, requires_grad=True)
        image, t = torch.empty(1, 1024, 64), torch.empty(1)
        forward, out = counted(lambda: model(image, t, condition, grid_positions(32, 32)))
        assert isinstance(out, torch.Tensor)
        items = generator_items(work, 16)
        close(flops(items, "generator forward"), forward)
        close(flops(items, "generator backward"), backward_of(out))


def test_lm_prefix_then_query_rows_forward_and_backward():
    from transformers import DynamicCache

    shape, p, q = replace(INTERNVL3_2B.lm, layers=2), 267, 256
    with torch.device("meta"):
        lm = lm_of(shape)
        prefix, queries = torch.empty(1, p, shape.width), torch.empty(1, q, shape.width, requires_grad=True)
        cache = DynamicCache(config=lm.config)
        of_prefix, _ = counted(lambda: lm(inputs_embeds=prefix, past_key_values=cache, use_cache=True))
        attend = torch.ones(1, p + q, dtype=torch.long)
        of_queries, out = counted(
            lambda: lm(inputs_embeds=queries, attention_mask=attend, past_key_values=cache, use_cache=True)
        )
        rows = lm_item("rows", shape, q, p + q, 2)
        close(lm_item("prefix", shape, p, p, 2).flops, of_prefix)
        close(rows.flops, of_queries)
        backward = input_gradient("rows", rows, lm_layer(1, 1))
        close(backward.flops, backward_of(out.last_hidden_state))


def test_vit_with_pixel_shuffle_and_projector():
    from transformers import InternVLConfig, InternVLModel

    vit, lm = replace(INTERNVL3_2B.vit, layers=2), INTERNVL3_2B.lm
    text = text_config(replace(lm, layers=1, vocabulary=10))
    with torch.device("meta"):
        model = InternVLModel(InternVLConfig(text_config=text, vision_config=vision_config(vit))).eval()
        pixels = torch.empty(1, 3, vit.image_px, vit.image_px)
        with torch.no_grad():
            count, out = counted(lambda: model.get_image_features(pixels).pooler_output)
    assert out.shape == (1, vit.tokens, lm.width)
    close(vit_item(vit, lm.width, 2).flops, count)


@pytest.mark.parametrize("image_px", [512, 1024])
def test_autoencoder_encode(image_px):
    with torch.device("meta"):
        vae = codec_of(FLUX_VAE)
        with torch.no_grad():
            count, _ = counted(lambda: vae.encoder(torch.empty(1, 3, image_px, image_px)))
    close(codec_item(FLUX_VAE, image_px).flops, count)


def test_adapter_forward_and_backward():
    p, q, width = 267, 256, 1536
    with torch.device("meta"):
        adapter = ResidualQueryAdapter(width, q, 12)
        forward, out = counted(lambda: adapter(torch.empty(1, p, width), torch.ones(1, p, dtype=torch.bool)))
        assert isinstance(out, torch.Tensor)
        items = adapter_items(width, p, q, 2)
        close(items[0].flops, forward)
        close(items[1].flops, backward_of(out))


def test_connector_forward_and_backward():
    with torch.device("meta"):
        connector = Connector(B.config.condition.connector, 1536, 1536)
        states = torch.empty(1, 256, 1536, requires_grad=True)
        forward, out = counted(lambda: connector(states, None))
        assert isinstance(out, torch.Tensor)
        items = connector_items(B, 256)
        close(items[0].flops, forward)
        close(items[1].flops, backward_of(out))


def test_the_split_saves_the_prefix_rows_backward():
    naive = sum(i.flops for i in condition_items(varied(B, condition__prefix_split=False), 16))
    split = sum(i.flops for i in condition_items(B, 16))
    prefix = flops(condition_items(B, 16), "LM prefix")
    assert naive - split == pytest.approx(prefix, rel=0.1)


def test_cached_encoders_cost_nothing():
    names = {item.name for item in image_items(varied(B, cached=frozenset({"vae", "vit"})), 16)}
    assert not names & {"autoencoder encode", "ViT"}


def test_dropped_tokens_leave_the_packed_prefix_with_room_for_almost_every_batch():
    work = varied(B, condition__mask_mode="drop")
    kept = 0.15 * 256
    assert work.prompt_tokens + 0.8 * kept < work.prefix_tokens(16) < work.prompt_tokens + 1.5 * kept
    assert work.prefix_tokens(256) < work.prefix_tokens(16) < B.prefix_tokens(16)


def test_fp8_takes_the_blocks_linears_and_adds_casts():
    work = small_work()
    eight = replace(work, config=replace(work.config, fp8=Fp8Config(recipe="current")))
    before, after = generator_items(work, 4)[0], generator_items(eight, 4)[0]
    assert after.flops == pytest.approx(before.flops)
    assert after.gemm_fp8 > 0.8 * (after.gemm + after.gemm_fp8)
    assert after.moved > before.moved


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_work_is_an_item_of_its_own(recompute):
    items = generator_items(varied(small_work(), parallel__recompute=recompute), 4)
    again = [item for item in items if item.again]
    assert len(again) == 1
    assert (again[0].flops > 0) == (recompute == "full")
