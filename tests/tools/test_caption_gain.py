"""What a condition tells a generator: the same losses as in training, and nothing left changed."""

import numpy as np
import pytest
import torch

from iomm.checkpoint.generator import open_generator
from iomm.data.loader import Loader
from iomm.evaluation.heldout import heldout_loss
from iomm.evaluation.shapes.prompts import benchmark
from iomm.evaluation.shapes.sampling import generator, scene_of
from iomm.evaluation.shapes.scene import render
from tests.random_run import save_random_run
from tests.small_run import small_config
from tools.caption_gain import gains, hits, main


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
    image, out = found["image", "adapted"], tmp_path / "out"
    line = f"| image | adapted | {image.own:.3f} | {image.other:.3f} | {image.percent:.1f} % |"
    assert main([str(run), "--pairs", "8", "--paint", str(out), "--per-category", "1"]) == 0
    said = capsys.readouterr().out
    assert line in said and "| adapted | two colours | 2 |" in said and "| fixed | one shape |" in said
    pictures = [(out / f"run-{queries}.png").read_bytes() for queries in ("adapted", "fixed")]
    assert len(set(pictures)) == 2


def test_true_pictures_hit_and_another_prompts_pictures_do_so_by_chance():
    prompts, rng = benchmark(10), generator(8, 9, 0)
    pictures = np.stack([render(scene_of(prompt.facts, rng)) for prompt in prompts])
    for found in hits(pictures, prompts):
        assert found.share >= 0.95 and found.chance < 0.5, found
    for moved in hits(np.roll(pictures, 1, axis=0), prompts):
        assert moved.share < 0.6, moved
    (one, *_) = hits(pictures, prompts)
    assert one.prompts == sum(len({w.colour for w in p.facts.wanted} - {None}) == 1 for p in prompts) > 0


def test_a_run_without_adapter_is_refused(world, mesh, tmp_path):
    settings = {"condition__queries": 0, "condition__condition_tokens": "all"}
    config, encoders, system = open_generator(
        save_random_run(small_config(world, tmp_path, **settings)), ema=True
    )
    item = encoders.encode(Loader(config.data, 0, on_bad=print).heldout(2), captioned_too=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"no query adapter \(condition.queries is 0\)"):
        gains(system, encoders, item)
