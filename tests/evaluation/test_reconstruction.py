"""Reconstruction against the mask ratio."""

import dataclasses
import json

import pytest
import torch

from iomm.checkpoint.generator import open_generator
from iomm.cli import main
from iomm.data.loader import Loader
from iomm.evaluation.heldout import copying, psnr_db
from iomm.evaluation.reconstruction import RATIOS, leave_reconstruction, measure
from iomm.evaluation.scores import read_reconstruction
from tests.random_run import save_random_run
from tests.small_run import small_config


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return save_random_run(small_config(world, tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def measured(run):
    config, encoders, system = open_generator(run, ema=True)
    batch = Loader(config.data, 0, on_bad=lambda bad: None).heldout(8)
    found, pictures = measure(
        system, encoders, batch.image_BCHW, batch.index_B, step=7, sampler_steps=2, ratios=(0.0, 0.5, 1.0)
    )
    check = copying(system, encoders, batch.image_BCHW, batch.index_B, steps=2)
    return found, pictures, batch, check


def test_the_curve_ends_in_the_null_condition_and_passes_through_the_trained_ratio(measured):
    found, pictures, batch, (check, masked, null) = measured
    assert torch.equal(pictures[2], null) and torch.equal(pictures[1], masked)
    assert not torch.equal(pictures[0], pictures[1])
    means = [interval.mean for interval in found.psnr_db]
    assert means[1:] == pytest.approx([check.psnr_image_db, check.psnr_null_db], rel=1e-5)
    own = psnr_db(pictures[0], batch.image_BCHW)
    assert own.min() <= found.psnr_db[0].low < means[0] < found.psnr_db[0].high <= own.max()
    assert (found.images, found.step, found.trained_mask_ratio) == (8, 7, 0.5)


def test_a_measurement_comes_back_as_it_was_left_beside_its_pictures(measured, tmp_path):
    found, pictures, batch, _ = measured
    path = leave_reconstruction(tmp_path, found, pictures, batch.image_BCHW)
    assert path.parent == tmp_path / "reconstruction" and path.name.startswith("step_00000007-")
    assert read_reconstruction(tmp_path, []) == found
    [sheet] = (tmp_path / "samples").iterdir()
    assert sheet.name == "step_000007_by_mask_ratio.png"
    whole = sheet.read_bytes()
    look = dataclasses.replace(found, ratios=found.ratios[:1], psnr_db=found.psnr_db[:1])
    assert leave_reconstruction(tmp_path, look, pictures[:1], batch.image_BCHW) != path
    assert (
        read_reconstruction(tmp_path, []) == found and sheet.read_bytes() == whole
    )  # a quick look hides nothing


def test_every_picture_has_its_own_noise_however_many_are_generated_together(run, measured, monkeypatch):
    monkeypatch.setattr("iomm.evaluation.reconstruction._AT_ONCE", 3)
    config, encoders, system = open_generator(run, ema=True)
    batch = Loader(config.data, 0, on_bad=lambda bad: None).heldout(8)
    _, pictures = measure(
        system, encoders, batch.image_BCHW, batch.index_B, step=7, sampler_steps=2, ratios=(1.0,)
    )
    assert (pictures[0].float() - measured[1][2].float()).abs().max() <= 1
    assert not torch.equal(pictures[0][0], pictures[0][3])


def test_a_checkpoint_is_measured_from_the_command_line(run, capsys):
    assert main(["evaluate", "reconstruction", str(run), "--images", "3", "--steps", "1"]) == 0
    assert capsys.readouterr().out.count(" dB  [") == len(RATIOS)
    [path] = (run / "reconstruction").iterdir()
    record = json.loads(path.read_text())
    assert (record["images"], record["sampler_steps"], record["ratios"]) == (3, 1, list(RATIOS))


def test_a_run_that_kept_no_average_is_measured_by_its_last_weights(world, tmp_path, capsys):
    run = save_random_run(small_config(world, tmp_path), ema=False)
    assert main(["evaluate", "reconstruction", str(run), "--images", "2", "--steps", "1"]) == 0
    assert capsys.readouterr().out.count(" dB  [") == len(RATIOS)


def test_a_mask_ratio_that_is_no_share_is_refused(run, capsys):
    assert main(["evaluate", "reconstruction", str(run), "--mask-ratio", "1.5"]) == 1
    assert "--mask-ratio 1.5 must lie in [0, 1]" in capsys.readouterr().err
