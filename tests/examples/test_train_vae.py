"""The tiny VAE: its training for a few steps, and the shipped model's figures."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from examples.tiny.train_vae import HERE, SHARDS, VaeRecipe, augment, build_vae, learning_rate_at, main, train
from examples.tiny.vae_figures import encode, finish, load_images, psnr, save, step_generator, to_signed
from examples.tiny.vae_start import start_from_patches

TINY = VaeRecipe(
    steps=8, batch_images=2, channels=(12, 16, 24, 32), whole_steps=2, latent_channels=4, warmup_steps=2
)


@pytest.fixture(scope="module")
def heldout_NCHW() -> torch.Tensor:
    return load_images([SHARDS / "heldout-0000.tar"])[1][:32]


@pytest.fixture(scope="module")
def shipped() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(HERE / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    assert isinstance(vae, AutoencoderKL)
    return vae


def test_the_shipped_vae_reconstructs_32_held_out_images_with_at_least_26_db(
    shipped: AutoencoderKL, heldout_NCHW: torch.Tensor
) -> None:
    assert psnr(shipped, heldout_NCHW).mean() >= 26
    assert psnr(shipped, heldout_NCHW, noise_std=0.1).mean() >= 24


def test_the_shipped_vae_has_flux_latents_and_measured_shift_and_scale(
    shipped: AutoencoderKL, heldout_NCHW: torch.Tensor
) -> None:
    latent_NKhw = encode(shipped, heldout_NCHW)
    assert latent_NKhw.shape == (32, 16, 8, 8)
    assert shipped.quant_conv is None
    assert shipped.post_quant_conv is None
    unit_NKhw = (latent_NKhw - shipped.config["shift_factor"]) * shipped.config["scaling_factor"]
    assert unit_NKhw.mean().item() == pytest.approx(0, abs=0.1)
    assert unit_NKhw.std().item() == pytest.approx(1, abs=0.1)


def test_the_shipped_vae_is_1_to_3_million_parameters_in_at_most_4_megabytes(shipped: AutoencoderKL) -> None:
    assert 1_000_000 <= sum(p.numel() for p in shipped.parameters()) <= 3_000_000
    assert (HERE / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size <= 4_000_000


def test_a_few_steps_are_the_same_twice_and_make_the_images_better(heldout_NCHW: torch.Tensor) -> None:
    first, losses = train(heldout_NCHW, TINY)
    second, again = train(heldout_NCHW, TINY)
    assert losses == again
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    untrained, _ = train(heldout_NCHW, replace(TINY, steps=0))
    assert psnr(first, heldout_NCHW[:8]).mean() > psnr(untrained, heldout_NCHW[:8]).mean() + 0.5


def test_another_seed_gives_other_losses(heldout_NCHW: torch.Tensor) -> None:
    recipe = replace(TINY, steps=1)
    other = replace(recipe, seed=1)
    assert train(heldout_NCHW, recipe)[1] != train(heldout_NCHW, other)[1]


def test_the_start_computes_latents_that_a_linear_decoder_turns_into_images_of_26_db(
    heldout_NCHW: torch.Tensor,
) -> None:
    torch.manual_seed(0)
    vae = build_vae(VaeRecipe())
    start_from_patches(vae, to_signed(load_images(sorted(SHARDS.glob("train-*.tar")))[1][::6]))
    latent_MK = encode(vae, heldout_NCHW).movedim(1, -1).flatten(0, 2)
    features_ML = torch.cat([latent_MK, torch.ones(len(latent_MK), 1)], dim=1)
    patches_MP = F.pixel_unshuffle(to_signed(heldout_NCHW), 8).movedim(1, -1).flatten(0, 2)
    decoded_MP = (features_ML @ torch.linalg.lstsq(features_ML, patches_MP).solution).clamp(-1, 1)
    mse_N = ((decoded_MP - patches_MP) / 2).square().view(len(heldout_NCHW), -1).mean(1)
    assert (-10 * mse_N.log10()).mean() > 25.5


def test_channels_that_do_not_fit_the_start_are_refused(heldout_NCHW: torch.Tensor) -> None:
    vae = build_vae(replace(TINY, channels=(8, 8, 8, 8)))
    with pytest.raises(ValueError, match="do not fit 4 latent channels"):
        start_from_patches(vae, to_signed(heldout_NCHW))


def test_augmentation_keeps_shape_and_range_and_is_a_function_of_the_stream(
    heldout_NCHW: torch.Tensor,
) -> None:
    one_BCHW = augment(heldout_NCHW, step_generator(0, 3))
    assert one_BCHW.shape == heldout_NCHW.shape
    assert one_BCHW.min() >= -1.0001
    assert one_BCHW.max() <= 1.0001
    assert torch.equal(one_BCHW, augment(heldout_NCHW, step_generator(0, 3)))
    assert not torch.equal(one_BCHW, augment(heldout_NCHW, step_generator(0, 4)))


def test_a_saved_vae_loads_with_the_figures_it_was_measured_with(
    tmp_path: Path, heldout_NCHW: torch.Tensor
) -> None:
    vae = finish(train(heldout_NCHW, TINY)[0], heldout_NCHW)
    line = save(vae, heldout_NCHW, tmp_path / "vae", command="do it", training="12 steps")
    loaded = AutoencoderKL.from_pretrained(
        tmp_path / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    assert isinstance(loaded, AutoencoderKL)
    unit_NKhw = encode(loaded, heldout_NCHW) - loaded.config["shift_factor"]
    assert (unit_NKhw * loaded.config["scaling_factor"]).std().item() == pytest.approx(1, abs=1e-3)
    assert f"PSNR {psnr(loaded, heldout_NCHW).mean():.2f} dB at noise 0.0" in line
    assert "12 steps" in " ".join((tmp_path / "vae" / "README.md").read_text().split())


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    recipe = VaeRecipe(steps=1000, warmup_steps=100)
    assert learning_rate_at(0, recipe) == pytest.approx(recipe.learning_rate / 100)
    assert learning_rate_at(100, recipe) == pytest.approx(recipe.learning_rate, rel=0.03)
    assert learning_rate_at(999, recipe) < 1e-3 * recipe.learning_rate


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0000.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"hold no \.webp image"):
        load_images([tmp_path / "train-0000.tar"])


def test_the_command_writes_a_model_and_its_figures(
    tmp_path: Path, heldout_NCHW: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "heldout"):
        with tarfile.open(tmp_path / f"{split}-0000.tar", "w") as shard:
            for i in range(2):
                picture = io.BytesIO()
                Image.fromarray(heldout_NCHW[i].permute(1, 2, 0).numpy()).save(picture, "WEBP")
                info = tarfile.TarInfo(f"{i}.webp")
                info.size = picture.tell()
                shard.addfile(info, io.BytesIO(picture.getvalue()))
    main(["--steps", "1", "--shards", str(tmp_path), "--out", str(tmp_path / "vae")])
    assert (tmp_path / "vae" / "config.json").is_file()
    assert "step 1: PSNR" in capsys.readouterr().out
