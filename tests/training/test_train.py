"""The training loop as its users see it: curves, folders, resumes, faults."""

import dataclasses
import json
import math
import os
import shutil
import signal
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iomm.checkpoint import sharded
from iomm.checkpoint.generator import open_generator
from iomm.data.errors import BadSampleReport
from iomm.evaluation.runlog import read_run
from iomm.presets import b, large, xl
from iomm.system import System
from iomm.training import notes
from iomm.training.progress import TrainingProgress
from iomm.training.train import train
from iomm.training.trainer import TrainingAborted
from iomm.training.watch import Watch
from tests.small_run import draw_png, events, losses, small_config, write_images, write_shard


def weights(run_dir: Path, *, ema: bool = True) -> dict[str, torch.Tensor]:
    return open_generator(run_dir, ema=ema)[2].state_dict()


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One uninterrupted run of the small configuration, images and pairs mixed."""
    config = small_config(world, tmp_path_factory.mktemp("runs"), data__mix_ratio=0.5)
    train(config)
    return config


def test_a_run_leaves_curves_grids_checkpoints_and_its_description(finished):
    run = finished.run_dir
    assert sorted(losses(run)) == list(range(1, 13))
    assert {p.name for p in (run / "samples").iterdir()} == {
        "step_000006_reconstruction.png",
        "step_000012_reconstruction.png",
        "step_000012_by_mask_ratio.png",
        "step_000012_text.png",
    }
    [curve] = (run / "reconstruction").iterdir()
    assert curve.name.startswith("step_00000012-")
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [f"step_{n:08d}" for n in (4, 8, 12)]
    described = json.loads((run / "run.json").read_text())
    assert described["config"] == json.loads(json.dumps(finished.to_dict()))
    evals = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line
    ]
    assert [e["step"] for e in evals] == [6, 12]
    assert evals[0]["velocity_loss"].keys() == {"image", "text", "null"}
    assert len(evals[0]["by_timestep"]["text"]) == 8


def test_training_lowers_the_loss(world, tmp_path):
    config = small_config(world, tmp_path, train__steps=60, train__save_every_steps=60)
    train(config)
    curve = list(losses(config.run_dir).values())
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10])


def test_a_run_can_be_stopped_and_resumed_without_a_trace(finished, world, tmp_path):
    config = small_config(world, tmp_path, data__mix_ratio=0.5)
    # As after a kill at step 11: lines up to there, and the checkpoint of step 8 is the newest.
    shutil.copytree(finished.run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "checkpoints" / "step_00000012")
    train(config)
    assert losses(config.run_dir) == losses(finished.run_dir)
    for ema in (True, False):
        again, straight = weights(config.run_dir, ema=ema), weights(finished.run_dir, ema=ema)
        assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert [e["step"] for e in events(config.run_dir, "resume")] == [8]


def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(finished, world, tmp_path, monkeypatch):
    config, real = small_config(world, tmp_path, data__mix_ratio=0.5), Watch.evaluate

    def fail_at_12(watch, system, run, step, *, last):
        if step == 12:
            raise RuntimeError("out of memory beside the training state")
        return real(watch, system, run, step, last=last)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="beside the training state"):
        patch.setattr(Watch, "evaluate", fail_at_12)
        train(config)
    assert sharded.find(config.run_dir).name == "step_00000012"
    train(config)
    again, straight = (read_run(one.run_dir).evals for one in (config, finished))
    assert [record["step"] for record in again] == [6, 12]
    assert [record["velocity_loss"] for record in again] == [record["velocity_loss"] for record in straight]


def test_settings_that_a_run_goes_on_with_otherwise_are_noted(world, tmp_path):
    train(small_config(world, tmp_path, train__steps=4))
    config = small_config(world, tmp_path, train__steps=5, optimizer__lr=1e-5)
    train(config)
    (event,) = events(config.run_dir, "settings_changed")
    assert event["step"] == 4 and "train.steps: 4, now 5" in event["detail"]
    assert len(event["detail"]) == 2 and "now 1e-05" in " ".join(event["detail"])


def test_a_finished_run_is_not_trained_again(finished):
    before = losses(finished.run_dir)
    assert train(finished).step == 12
    assert losses(finished.run_dir) == before


def test_gradient_accumulation_gives_the_same_curve(finished, world, tmp_path):
    config = small_config(world, tmp_path, data__mix_ratio=0.5, train__micro_batch_images=2)
    train(config)
    assert losses(config.run_dir) == pytest.approx(losses(finished.run_dir), rel=1e-4)


def test_the_naive_pass_gives_the_same_curve_as_the_prefix_split(finished, world, tmp_path):
    config = small_config(world, tmp_path, data__mix_ratio=0.5, condition__prefix_split=False)
    train(config)
    assert losses(config.run_dir) == pytest.approx(losses(finished.run_dir), rel=1e-4)


def test_cached_features_give_the_same_curve_and_are_found_again(finished, world, tmp_path):
    settings = {"data__mix_ratio": 0.5, "data__cache_dir": str(tmp_path / "cache")}
    first = small_config(world, tmp_path, "first", **settings)
    train(first)
    assert losses(first.run_dir) == pytest.approx(losses(finished.run_dir), rel=1e-4)
    parts = sorted((tmp_path / "cache").rglob("part-*"))
    assert parts
    second = small_config(world, tmp_path, "second", **settings)
    train(second)
    assert losses(second.run_dir) == losses(first.run_dir)
    assert sorted((tmp_path / "cache").rglob("part-*")) == parts


@pytest.mark.parametrize("preset", [b, large, xl], ids=["b", "l", "xl"])
def test_the_big_presets_recipes_train_in_bf16_when_their_shapes_are_shrunk(world, tmp_path, preset):
    small, big = small_config(world, tmp_path), preset("big", ["x.tar"])
    condition = dataclasses.replace(small.condition, mask_ratio=big.condition.mask_ratio)
    train_ = dataclasses.replace(small.train, steps=3, precision=big.train.precision, eval_every_steps=100)
    shape = {} if preset is not xl else dict(double_blocks=0, single_blocks=2, refiner_blocks=1)
    generator = dataclasses.replace(
        small.generator, family=big.generator.family, predict=big.generator.predict, **shape
    )
    changes = {"data": small.data, "mllm": small.mllm, "codec": small.codec, "out_dir": small.out_dir}
    config = dataclasses.replace(big, **changes, condition=condition, train=train_, generator=generator)
    train(config)
    assert config.train.precision == "bf16"
    assert len(losses(config.run_dir)) == 3
    assert all(math.isfinite(loss) for loss in losses(config.run_dir).values())
    assert weights(config.run_dir, ema=config.optimizer.ema_decay is not None)


def test_the_single_stream_family_learns_from_conditions_of_different_lengths(world, tmp_path):
    shape = dict(family="z_image", double_blocks=0, single_blocks=2, refiner_blocks=1)
    settings = {f"generator__{name}": value for name, value in shape.items()}
    settings |= {"condition__condition_tokens": "all", "data__mix_ratio": 0.5}  # images and captions mixed
    settings |= {"train__eval_every_steps": 100, "train__sample_every_steps": 100}
    still, learning = (
        small_config(world, tmp_path, name, optimizer__lr=lr, **settings)
        for name, lr in (("still", 0.0), ("learning", 3e-3))
    )
    train(still)
    train(learning)
    before, after = (list(losses(config.run_dir).values()) for config in (still, learning))
    assert after[:1] == before[:1]  # the same samples, noise and timesteps, step by step
    assert sum(after[-6:]) < 0.9 * sum(before[-6:])


def test_stage_two_starts_from_the_averaged_weights_of_stage_one(finished, world, tmp_path):
    config = small_config(
        world, tmp_path, train__init_from=str(finished.run_dir), train__steps=1, optimizer__lr=0.0
    )
    train(config)
    started, averaged = weights(config.run_dir, ema=False), weights(finished.run_dir, ema=True)
    assert all(torch.equal(started[name], averaged[name]) for name in averaged)


def test_another_architecture_is_refused_by_its_first_differing_setting(finished, world):
    config = small_config(world, finished.run_dir.parent, data__mix_ratio=0.5, generator__double_blocks=1)
    with pytest.raises(sharded.CheckpointError, match=r"generator\.double_blocks = 2, this run .*1"):
        train(config)


def poisoned(monkeypatch, bad_steps, batch=8):
    """Make the loss of the given steps NaN."""
    real = System.advance

    def advance(system, chunk, carried_SBD, item, mllm):
        step = int(item.index_B[0]) // batch + 1
        return real(system, chunk, carried_SBD, item, mllm) * (float("nan") if step in bad_steps else 1.0)

    monkeypatch.setattr(System, "advance", advance)


def test_a_nan_step_is_skipped_and_counted_and_the_run_goes_on(world, tmp_path, monkeypatch):
    poisoned(monkeypatch, {5})
    config = small_config(world, tmp_path)
    train(config)
    curve = losses(config.run_dir)
    assert curve[5] is None
    assert all(math.isfinite(curve[step]) for step in curve if step != 5)
    (skip,) = events(config.run_dir, "nan_skip")
    assert skip["step"] == 5 and len(skip["detail"]["keys"]) == 8
    assert all(torch.isfinite(w).all() for w in weights(config.run_dir).values())


def test_too_many_nan_steps_end_the_run_with_the_sample_keys(world, tmp_path, monkeypatch):
    poisoned(monkeypatch, {6, 7, 8})
    config = small_config(world, tmp_path, train__abort_after_bad_steps=3)
    with pytest.raises(TrainingAborted, match=r"step 8: loss nan.*3 steps in a row.*i00\d\d, i00\d\d"):
        train(config)
    assert sharded.find(config.run_dir).name == "step_00000004"


def test_an_unreadable_image_is_replaced_counted_and_named(world, tmp_path):
    members = [(f"i{i}.png", draw_png(i)) for i in range(10)]
    members[3] = ("i3.png", draw_png(3)[:60])
    shard = write_shard(tmp_path / "damaged.tar", members)
    config = small_config(world, tmp_path, data__images=[str(shard)], train__eval_every_steps=100)
    train(config)
    (entry,) = [json.loads(line) for line in (config.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert entry["key"] == "i3" and entry["reason"]
    (event,) = events(config.run_dir, "bad_sample")
    assert "i3" in event["detail"]
    assert sorted(losses(config.run_dir)) == list(range(1, 13))


def test_a_run_stopped_between_two_lines_of_its_log_has_listed_what_it_could_not_read(
    world, tmp_path, monkeypatch
):
    members = [(f"i{i}.png", draw_png(i)) for i in range(10)]
    members[3] = ("i3.png", draw_png(3)[:60])
    shard = write_shard(tmp_path / "damaged.tar", members)
    settings = {"data__images": [str(shard)], "train__log_every_steps": 100}
    config, update = small_config(world, tmp_path, **settings), TrainingProgress.update

    def stop_at_3(screen, step, *what):
        update(screen, step, *what)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingProgress, "update", stop_at_3)
    assert train(config).step == 3
    (entry,) = [json.loads(line) for line in (config.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert entry["key"] == "i3" and not losses(config.run_dir)


def test_the_bad_samples_of_all_ranks_are_listed_each_once(monkeypatch):
    mine, other = (BadSampleReport("a.tar", key, "torn") for key in ("mine", "other"))
    listed, told = [], []
    for rank in (0, 1):
        trainer: Any = SimpleNamespace(
            mesh=SimpleNamespace(gather_objects=lambda own: [own, [other, mine], []]),
            run=SimpleNamespace(
                writes=rank == 0, bad_sample=listed.append, event=lambda *event: told.append(event)
            ),
            bad_samples=deque([mine]),
            stalls=deque(),
        )
        notes.quarantine(trainer, 7)
        assert not trainer.bad_samples
    assert listed == [mine, other] * 2
    assert told == [(7, "bad_sample", str(report)) for report in (mine, other, mine)]


def test_a_full_disk_while_saving_lets_the_run_go_on_and_keeps_the_last_good_checkpoint(
    world, tmp_path, monkeypatch
):
    config = small_config(world, tmp_path)
    real, full = shutil.disk_usage, False

    def disk_usage(path):
        return real(path)._replace(free=1000) if full else real(path)

    def fill_disk_at_step_5(*arguments):
        nonlocal full
        full = full or arguments[1] >= 5

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(notes, "quarantine", fill_disk_at_step_5)
    with pytest.raises(sharded.CheckpointError, match=r"disk of .* is full: a checkpoint needs [\d,]+ bytes"):
        train(config)  # step 8's save fails and the run goes on; the last one, at step 12, must not be lost
    assert [e["step"] for e in events(config.run_dir, "save_failed")] == [8, 12]
    assert sorted(losses(config.run_dir)) == list(range(1, 13))
    assert sharded.find(config.run_dir).name == "step_00000004"
    assert weights(config.run_dir)


def test_missing_shards_are_said_before_the_run_folder_is_made(world, tmp_path):
    config = small_config(world, tmp_path, data__images=[str(tmp_path / "none-*.tar")])
    with pytest.raises(FileNotFoundError, match=r"none-\*\.tar"):
        train(config)
    assert not config.run_dir.exists()


def test_an_image_side_that_does_not_fit_the_tokens_is_said_before_anything_starts(world, tmp_path):
    with pytest.raises(ValueError, match="40 x 40 px .* multiples of the 16 pixels .*Change data.image_px"):
        train(small_config(world, tmp_path, data__image_px=40))


def test_a_caption_over_the_limit_names_the_limit_and_the_sample(world, tmp_path):
    shard = write_images(tmp_path / "a.tar", 0, 8)
    long = write_shard(tmp_path / "b.tar", [("long.png", draw_png(1)), ("long.txt", b"x" * 81)])
    pairs = {"data__pairs": [str(shard), str(long)], "data__mix_ratio": 0.0, "data__heldout": []}
    with pytest.raises(
        ValueError, match=r"sample long: .*81 tokens; the limit is mllm\.max_caption_tokens = 80"
    ):
        train(small_config(world, tmp_path, **pairs, data__long_captions="error"))
    config = small_config(world, tmp_path, "skips", **pairs, train__steps=2)
    train(config)
    [line] = (config.run_dir / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["key"] == "long"
    assert "81 tokens; the limit is mllm.max_caption_tokens = 80" in entry["reason"]
