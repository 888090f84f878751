"""The assembled generator with every frozen part it can stand on."""

from pathlib import Path

import pytest
import torch

from iomm.data.loader import Batch
from iomm.data.view import View
from iomm.encoders import Encoders, Shapes
from iomm.flow.path import grid_positions
from iomm.model.init import initialize
from iomm.parallel.mesh import Mesh
from iomm.sampling import paint
from iomm.system import System, build, count_condition_flops, training_loss
from tests.small_run import IMAGE_PX, small_config
from tests.tiny_models import MLLMS, save_dc_ae, save_flux2_vae, save_vae

CODECS = {"flux": (save_vae, 2, 64), "flux2": (save_flux2_vae, 2, 16), "dc_ae": (save_dc_ae, 1, 8)}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    for name, save in MLLMS.items():
        save(folder / name)
    for name, (save, _, _) in CODECS.items():
        save(folder / name)
    return folder


def config_of(world, frozen, out, mllm, codec, **settings):
    _, patch, numbers = CODECS[codec]
    return small_config(
        world,
        out,
        mllm__path=str(frozen / mllm),
        codec__path=str(frozen / codec),
        codec__patch=patch,
        generator__token_channels=numbers,
        **settings,
    )


def batch() -> Batch:
    torch.manual_seed(0)
    return Batch(
        index_B=torch.arange(3),
        keys=("a", "b", "c"),
        captions=(None, "red ball", None),
        image_BCHW=torch.randint(0, 256, (3, 3, IMAGE_PX, IMAGE_PX), dtype=torch.uint8),
        hashes=("ha", "hb", "hc"),
        views=(View(IMAGE_PX, IMAGE_PX),) * 3,
    )


@pytest.mark.parametrize("mllm", MLLMS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_mllm_trains_and_paints_with_every_codec(
    world, frozen, tmp_path, mesh: Mesh, mllm: str, codec: str
):
    config = config_of(world, frozen, tmp_path, mllm, codec)
    encoders = Encoders(config, torch.device("cpu"))
    system = build(config, encoders.shapes, mesh)
    loss_B = training_loss(system, encoders, encoders.encode(batch()))
    assert loss_B.shape == (3,)
    loss_B.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)
    assert system.conditioner.adapter is not None
    assert system.conditioner.adapter.queries.grad is not None
    pictures = paint(system, encoders, ["red ball"], seed=0, steps=1, guidance=2.0)
    assert pictures.shape == (1, 3, IMAGE_PX, IMAGE_PX)


@pytest.mark.parametrize("tokens", ["queries", "all"])
@pytest.mark.parametrize("mllm", MLLMS)
def test_dropping_masked_tokens_trains_as_hiding_them_does(
    world, frozen, tmp_path, mesh: Mesh, mllm: str, tokens: str
):
    found = {}
    for mode in ("hide", "drop"):
        settings = {"condition__mask_mode": mode, "condition__condition_tokens": tokens}
        config = config_of(world, frozen, tmp_path, mllm, "flux", train__precision="fp64", **settings)
        encoders = Encoders(config, torch.device("cpu"))
        system = build(config, encoders.shapes, mesh)
        torch.manual_seed(1)
        for parameter in system.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # leaves the zero gates of the start
        loss_B = training_loss(system, encoders, encoders.encode(batch()))
        loss_B.sum().backward()
        found[mode] = loss_B.detach(), dict(system.named_parameters())
    torch.testing.assert_close(found["hide"][0], found["drop"][0], rtol=0, atol=1e-10)
    for name, parameter in found["hide"][1].items():
        gradient = found["drop"][1][name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-10, msg=name)
        if name.startswith("conditioner.adapter") and "key.bias" not in name:
            assert gradient.abs().max() > 1e-8, name
    assert int(encoders.prefixes.dropped) == 0


@pytest.mark.parametrize("mode", ["zero", "hide", "drop"])
def test_the_mllms_eye_sees_no_sample_that_a_caption_conditions(
    world, frozen, tmp_path, mesh: Mesh, monkeypatch, mode: str
):
    cache = {"condition__mask_mode": mode, "data__cache_dir": str(tmp_path / "cache")}
    config = config_of(world, frozen, tmp_path, "internvl", "flux", **cache)
    encoders = Encoders(config, torch.device("cpu"))
    system = build(config, encoders.shapes, mesh)
    seen, vision = [], encoders.mllm.vision
    monkeypatch.setattr(encoders.mllm, "vision", lambda image: [seen.append(len(image)), vision(image)][1])
    mixed, pairs = encoders.encode(batch()), encoders.encode(batch().take([1]))
    assert sum(seen) == 2 and pairs.patches_BNF is None
    everything = encoders.encode(batch(), captioned_too=True)
    assert sum(seen) == 3
    loss_B = training_loss(system, encoders, mixed)
    assert torch.equal(loss_B, training_loss(system, encoders, everything))
    alone_B = training_loss(system, encoders, pairs)
    torch.testing.assert_close(alone_B, loss_B[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mllm", MLLMS)
def test_cached_patch_tokens_keep_their_deepstack_features(world, frozen, tmp_path, mllm: str):
    plain = Encoders(config_of(world, frozen, tmp_path, mllm, "flux"), torch.device("cpu")).encode(batch())
    config = config_of(world, frozen, tmp_path, mllm, "flux", data__cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # encoded, then read back
        cached = Encoders(config, torch.device("cpu")).encode(batch())
        torch.testing.assert_close(cached.patches_BNF, plain.patches_BNF, rtol=0, atol=1e-5)
        torch.testing.assert_close(cached.latent_BLC, plain.latent_BLC, rtol=0, atol=1e-5)


def test_weights_with_pooled_text_and_guidance_inputs_are_fed_constants(mesh: Mesh, tmp_path: Path) -> None:
    settings = {"pooled_width": 6, "guidance_embedding": True, "guidance_value": 2.0, "predict": "velocity"}
    given = {f"generator__{name}": value for name, value in settings.items()}
    config = small_config(tmp_path, tmp_path, **given)
    system = System(config, Shapes((2, 2), 16, config.generator.token_channels, 4, 24), mesh)
    initialize(system, 0)
    with torch.no_grad():
        for parameter in system.generator.parameters():
            parameter.add_(0.05)  # leaves the zero gates of the start
    x, t, c = torch.randn(2, 4, config.generator.token_channels), torch.rand(2), torch.randn(2, 3, 24)
    fed = {"pooled_BP": torch.zeros(2, 6), "guidance_B": torch.full((2,), 2.0)}
    expected = system.generator(x, t, c, grid_positions(2, 2), **fed)
    assert expected.abs().max() > 0
    assert torch.equal(system.velocity(x, t, (c, None)), expected)
    flat = system.generator(x, t, c, grid_positions(1, 4), **fed)
    assert torch.equal(system.velocity(x, t, (c, None), (1, 4)), flat)
    assert not torch.equal(flat, expected)


@pytest.mark.parametrize("mllm", MLLMS)
def test_the_condition_costs_the_same_flops_hidden_and_dropped_when_every_token_is_kept(
    world, frozen, tmp_path, mesh: Mesh, mllm: str
):
    found = {}
    for mode in ("hide", "drop"):
        config = config_of(world, frozen, tmp_path, mllm, "flux", condition__mask_mode=mode)
        encoders = Encoders(config, torch.device("cpu"))
        conditioner = build(config, encoders.shapes, mesh).conditioner
        assert conditioner is not None
        found[mode] = count_condition_flops(conditioner, encoders)
    assert found["drop"] == found["hide"]
    assert min(found["drop"].prefix, found["drop"].adapter, found["drop"].queries) > 0


def test_with_csrc_prefixes_take_pytorchs_operators_where_none_is_compiled(
    frozen, world, tmp_path, monkeypatch
):
    monkeypatch.setattr("iomm.parallel.backend.csrc.load_problem", lambda device: None)
    config = config_of(
        world, frozen, tmp_path, "internvl", "flux", kernels="csrc", condition__mask_mode="drop"
    )
    encoders = Encoders(config, torch.device("cpu"))
    patches = torch.zeros(2, encoders.mllm.image_tokens, encoders.mllm.width)
    keep = torch.rand(patches.shape[:2]) < 0.5
    assert encoders.prefixes.for_images(patches, keep) is not None
