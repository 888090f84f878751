"""What a condition tells a generator: the same losses as in training, and nothing left changed."""

import numpy as np
import pytest
import torch

from iomm.checkpoint.generator import open_generator
from iomm.data.loader import Loader
from iomm.evaluation.heldout import heldout_loss
from tests.random_run import save_random_run
from tests.small_run import small_config
from tools.caption_gain import gains, main


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_its_losses_are_those_of_training_and_fixed_queries_are_undone(world, mesh, tmp_path, capsys, mode):
    run = save_random_run(small_config(world, tmp_path, condition__mask_mode=mode))
    config, encoders, system = open_generator(run, ema=True)
    batch = Loader(config.data, 0, on_bad=print).heldout(8)
    item = encoders.encode(batch, captioned_too=True)
    before = heldout_loss(system, encoders, [item], mesh, 8).by_timestep
    found = {(gain.condition, gain.queries): gain for gain in gains(system, encoders, item)}
    for condition, name in (("image", "image"), ("caption", "text")):
        adapted, fixed = found[condition, "adapted"], found[condition, "fixed"]
        assert adapted.own == pytest.approx(np.mean(before[name][1:]), rel=1e-5)
        assert len({adapted.own, adapted.other, fixed.own, fixed.other}) == 4
    assert heldout_loss(system, encoders, [item], mesh, 8).by_timestep == before
    assert main([str(run), "--pairs", "8"]) == 0
    image = found["image", "adapted"]
    line = f"| image | adapted | {image.own:.3f} | {image.other:.3f} | {image.percent:.1f} % |"
    assert line in capsys.readouterr().out


def test_a_run_without_adapter_is_refused(world, mesh, tmp_path):
    settings = {"condition__queries": 0, "condition__condition_tokens": "all"}
    config, encoders, system = open_generator(
        save_random_run(small_config(world, tmp_path, **settings)), ema=True
    )
    item = encoders.encode(Loader(config.data, 0, on_bad=print).heldout(2), captioned_too=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"no query adapter \(condition.queries is 0\)"):
        gains(system, encoders, item)
