"""The codecs against diffusers' own pipelines: packing, normalisation, round trips, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from iomm.autoencoder import open_codec
from iomm.config import CodecConfig
from iomm.flow.path import patchify
from tests.tiny_models import save_dc_ae, save_flux2_vae, save_vae

CPU = torch.device("cpu")
CODECS = {"flux": (save_vae, 2), "flux2": (save_flux2_vae, 2), "dc_ae": (save_dc_ae, 1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save(tmp_path_factory.mktemp(name)) for name, (save, _) in CODECS.items()}


def opened(folders, name, dtype=torch.float64):
    return open_codec(CodecConfig(path=str(folders[name]), patch=CODECS[name][1]), dtype, CPU)


def images(side=48, count=2):
    torch.manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def pixels(image):
    return image.double() / 127.5 - 1


def to_uint8(image):
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def test_flux_tokens_equal_the_flux_pipelines(folders):
    from diffusers import FluxPipeline

    codec, image = opened(folders, "flux"), images()
    latent = (codec.vae.encode(pixels(image)).latent_dist.mode() - 0.1) * 0.5
    theirs = FluxPipeline._pack_latents(latent, *latent.shape)
    ours = codec.encode(image)
    assert torch.equal(ours, theirs)
    unpacked = FluxPipeline._unpack_latents(theirs, 48, 48, vae_scale_factor=8) / 0.5 + 0.1
    assert torch.equal(codec.decode(ours), to_uint8(codec.vae.decode(unpacked).sample))


@torch.no_grad()
def test_flux2_tokens_equal_the_flux2_pipelines(folders):
    from diffusers import Flux2Pipeline

    codec, image = opened(folders, "flux2"), images()
    stand_in = SimpleNamespace(vae=codec.vae, _patchify_latents=Flux2Pipeline._patchify_latents)
    encode = Flux2Pipeline._encode_vae_image
    theirs_BCHW = encode(stand_in, pixels(image), None)  # pyright: ignore[reportArgumentType]
    ours = codec.encode(image)
    assert torch.equal(ours, Flux2Pipeline._pack_latents(theirs_BCHW))
    bn, eps = codec.vae.bn, codec.vae.config.batch_norm_eps
    std, mean = (bn.running_var + eps).sqrt().view(1, -1, 1, 1), bn.running_mean.view(1, -1, 1, 1)
    latent = Flux2Pipeline._unpatchify_latents(theirs_BCHW * std + mean)
    assert torch.equal(codec.decode(ours), to_uint8(codec.vae.decode(latent).sample))


@torch.no_grad()
def test_dc_ae_tokens_are_the_scaled_latent_pixels(folders):
    codec, image = opened(folders, "dc_ae"), images()
    latent = codec.vae.encode(pixels(image)).latent
    ours = codec.encode(image)
    assert torch.equal(ours, (latent * 0.4).flatten(2).transpose(1, 2))
    # SanaPipeline decodes latents / scaling_factor.
    back = (ours / 0.4).transpose(1, 2).reshape(latent.shape)
    assert torch.equal(codec.decode(ours), to_uint8(codec.vae.decode(back).sample))


@pytest.mark.parametrize(("name", "numbers", "unit"), [("flux", 64, 16), ("flux2", 16, 16), ("dc_ae", 8, 8)])
def test_token_sizes_are_read_from_the_model(folders, name, numbers, unit):
    codec = opened(folders, name)
    assert (codec.token_channels, codec.token_px, codec.grid(96, 192)) == (
        numbers,
        unit,
        (96 // unit, 192 // unit),
    )
    assert codec.encode(images(96, 1)).shape == (1, (96 // unit) ** 2, numbers)


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_decode_undoes_the_normalisation_and_packing_of_encode(folders, name):
    codec, image = opened(folders, name), images()
    out = codec.vae.encode(pixels(image))
    latent = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent
    direct = to_uint8(codec.vae.decode(latent).sample)
    assert (codec.decode(codec.encode(image)).int() - direct.int()).abs().max() <= 1  # a rounding tie at most


@pytest.mark.parametrize("name", CODECS)
def test_odd_sizes_are_refused_with_the_pixels_of_a_token(folders, name):
    codec = opened(folders, name)
    with pytest.raises(
        ValueError, match=rf"44 x 48 px is not made of whole tokens.* of the {codec.token_px} pixels"
    ):
        codec.encode(images()[:, :, :44])
    with pytest.raises(
        ValueError, match=rf"96 x 50 px .*multiples of the {codec.token_px} pixels .*data.image_px"
    ):
        codec.grid(96, 50)
    wide = images()[:, :, : codec.token_px, : 2 * codec.token_px]
    assert codec.decode(codec.encode(wide), (1, 2)).shape == wide.shape
    with pytest.raises(ValueError, match=r"5 tokens do not fill a grid"):
        codec.decode(torch.zeros(1, 5, codec.token_channels))


def test_a_patch_that_the_running_statistics_are_not_made_for_is_refused(folders):
    with pytest.raises(ValueError, match=r"tokens of 4 numbers, .* statistics of 16. Set codec.patch to 2"):
        open_codec(CodecConfig(path=str(folders["flux2"]), patch=1), torch.float32, CPU)


def test_the_identity_tells_codecs_patches_and_precisions_apart(folders):
    seen = {
        opened(folders, name, dtype).identity() for name in CODECS for dtype in (torch.float32, torch.float64)
    }
    seen.add(open_codec(CodecConfig(path=str(folders["flux"]), patch=1), torch.float32, CPU).identity())
    assert len(seen) == 7
    assert opened(folders, "flux2").identity() in seen


def test_the_published_sizes_come_out_of_the_default_configurations():
    from diffusers import AutoencoderDC, AutoencoderKLFlux2

    from iomm.autoencoder import LatentCodec

    with torch.device("meta"):
        flux2 = LatentCodec(AutoencoderKLFlux2(), CodecConfig(path="", patch=2))
        dc_ae = LatentCodec(AutoencoderDC(), CodecConfig(path="", patch=1))
    assert (flux2.token_channels, flux2.token_px, flux2.grid(512, 256)) == (128, 16, (32, 16))
    assert (dc_ae.token_channels, dc_ae.token_px, dc_ae.grid(512, 256)) == (32, 32, (16, 8))


def test_another_autoencoder_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(
        ValueError, match=r"is a AutoencoderTiny; known are AutoencoderKL, AutoencoderKLFlux2, A"
    ):
        open_codec(CodecConfig(path=str(tmp_path)), torch.float32, CPU)


def test_latent_statistics_that_would_be_ignored_are_refused(folders, tmp_path):
    settings = json.loads((folders["flux"] / "config.json").read_text()) | {"latents_mean": [0.0] * 16}
    for file in folders["flux"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"declares latents_mean or latents_std"):
        open_codec(CodecConfig(path=str(tmp_path)), torch.float32, CPU)


def test_missing_weights_say_in_one_line_what_to_download_and_where_to_put_it(tmp_path):
    folder = tmp_path / "flux" / "vae"
    message = rf"hf download black-forest-labs/FLUX.1-schnell .* --local-dir {folder.parent}`\).*{folder}\."
    with pytest.raises(FileNotFoundError, match=rf"config.json is missing.*{message}") as error:
        open_codec(CodecConfig(path=str(folder)), torch.float32, CPU)
    assert "\n" not in str(error.value)
    save_vae(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=message) as error:
        open_codec(CodecConfig(path=str(folder)), torch.float32, CPU)
    assert "\n" not in str(error.value)


def test_a_hub_name_that_cannot_be_had_is_an_error_of_one_line():
    with pytest.raises(
        FileNotFoundError, match=r"no autoencoder at nobody/none: there is no such folder"
    ) as error:
        open_codec(CodecConfig(path="nobody/none"), torch.float32, CPU)
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_a_draw_is_diffusers_draw_of_the_latent_normalised(folders, name):
    codec, image = opened(folders, name), images(count=1)
    moments = codec.moments(image)
    assert torch.equal(moments.mean_BLC, codec.encode(image))
    there = codec.vae.encode(pixels(image)).latent_dist
    z = torch.randn_like(there.mean)
    theirs = codec.normalisation.forward(patchify(there.mean + there.std * z, 2))
    torch.testing.assert_close(moments.draw(patchify(z, 2)), theirs, rtol=1e-12, atol=1e-12)
    assert (theirs - moments.mean_BLC).abs().max() > 1e-3


def test_an_autoencoder_without_a_distribution_has_no_log_variance_and_cannot_be_drawn_from(folders):
    assert opened(folders, "dc_ae").moments(images()).logvar_BLC is None
    with pytest.raises(ValueError, match="AutoencoderDC.* gives none. Set codec.sample=false"):
        open_codec(CodecConfig(path=str(folders["dc_ae"]), patch=1, sample=True), torch.float32, CPU)
