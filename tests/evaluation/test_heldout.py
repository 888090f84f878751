"""The held-out loss and the copying alarm."""

import pytest
import torch

from iomm.checkpoint.generator import open_generator
from iomm.data.loader import Loader
from iomm.evaluation.heldout import COPY_DB, LEAK_DB, Copying, copying, heldout_loss, psnr_db
from iomm.parallel.mesh import start
from iomm.training.train import train
from tests.small_run import small_config


@pytest.fixture(scope="module")
def opened(world, tmp_path_factory):
    config = small_config(
        world, tmp_path_factory.mktemp("runs"), train__steps=30, train__eval_every_steps=100
    )
    train(config)
    config, encoders, system = open_generator(config.run_dir, ema=False)
    return config, encoders, system, Loader(config.data, 0, on_bad=lambda bad: None).heldout(8)


def test_the_loss_is_the_same_each_time_and_however_the_samples_are_batched(opened):
    config, encoders, system, batch = opened
    mesh = start(config.parallel)
    whole = heldout_loss(system, encoders, [encoders.encode(batch, captioned_too=True)], mesh, 8)
    assert heldout_loss(system, encoders, [encoders.encode(batch, captioned_too=True)], mesh, 8) == whole
    parts = [encoders.encode(batch.take(rows), captioned_too=True) for rows in (range(3), range(3, 8))]
    split = heldout_loss(system, encoders, parts, mesh, 8)
    for name in whole.mean:
        assert split.by_timestep[name] == pytest.approx(whole.by_timestep[name], rel=1e-4)


def test_a_trained_model_is_better_than_one_that_predicts_nothing(opened):
    config, encoders, system, batch = opened
    mesh, items = start(config.parallel), [encoders.encode(batch, captioned_too=True)]
    trained = heldout_loss(system, encoders, items, mesh, 8).mean["image"]
    out = system.generator.out
    kept = [p.clone() for p in out.parameters()]
    for p in out.parameters():
        p.zero_()
    blank = heldout_loss(system, encoders, items, mesh, 8).mean["image"]
    for p, value in zip(out.parameters(), kept, strict=True):
        p.copy_(value)
    assert trained < blank


def test_psnr_of_known_images():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = torch.stack((torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255.0))).to(torch.uint8)
    assert psnr_db(a, b).tolist() == pytest.approx([100.0, 0.0], abs=1e-4)


def test_the_check_paints_from_masked_and_from_null_conditions(opened):
    _, encoders, system, batch = opened
    check, masked, null = copying(system, encoders, batch.image_BCHW, batch.index_B, steps=2)
    assert masked.shape == null.shape == batch.image_BCHW.shape
    assert check.mask_ratio == 0.5
    assert check.psnr_null_db == pytest.approx(psnr_db(null, batch.image_BCHW).mean().item())


@pytest.mark.parametrize(
    ("null", "other", "image", "ratio", "said"),
    [
        (12.0, 11.0, 15.0, 0.85, None),
        (12.0 + LEAK_DB, 11.0, 15.0, 0.85, "leaks past the mask"),
        (12.0, 11.0, COPY_DB + 1, 0.85, "copies; raise condition.mask_ratio"),
        (12.0, 11.0, COPY_DB + 1, 0.0, None),  # nothing was hidden, so nothing is wrong with a good copy
    ],
)
def test_the_alarm_rings_for_a_leak_and_for_a_copy(null, other, image, ratio, said):
    reason = Copying(null, other, image, ratio).reason
    assert reason is None if said is None else said in reason
