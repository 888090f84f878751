"""`iomm shapes` and `iomm evaluate shapes`, from the command line to the files."""

import json

import numpy as np
import pytest
import torch

from iomm.cli import main
from iomm.evaluation.scores import read_scores
from iomm.evaluation.shapes import evaluation
from iomm.evaluation.shapes.evaluation import EvaluationOptions, evaluate_shapes
from iomm.evaluation.shapes.prompts import benchmark
from iomm.evaluation.shapes.sampling import generator, scene_of
from iomm.evaluation.shapes.scene import render
from tests.random_run import save_random_run
from tests.small_run import small_config


def test_a_perfect_painter_scores_one_whatever_the_batch(monkeypatch):
    """Every prompt is painted from its own text, in order, each picture numbered once."""
    facts = {prompt.text: prompt.facts for prompt in benchmark(2)}
    calls = []

    def paint(system, encoders, prompts, *, first, **settings):
        calls.append((first, len(prompts), settings))
        pictures = [
            render(scene_of(facts[text], generator(1, 1, first + i))) for i, text in enumerate(prompts)
        ]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    monkeypatch.setattr(evaluation, "paint", paint)
    options = EvaluationOptions(per_category=2, images_per_prompt=2, batch_images=16, guidance=2.0)
    found, images_NHW3 = evaluate_shapes(None, None, options)  # pyright: ignore[reportArgumentType]
    assert [call[:2] for call in calls] == [(0, 16), (16, 16), (32, 4)]
    assert calls[0][2] == {"seed": 0, "steps": 25, "guidance": 2.0, "method": "euler"}
    assert images_NHW3.shape == (36, 64, 64, 3)
    assert [split.overall.mean for split in found.splits.values()] == [1, 1, 1]


def test_a_checkpoint_is_scored_from_the_command_line(world, mesh, tmp_path, capsys):
    run = save_random_run(small_config(world, tmp_path))
    out = tmp_path / "scores"
    options = ["--per-category", "1", "--steps", "1", "--batch", "5", "--guidance", "1"]
    assert main(["evaluate", "shapes", str(run), *options, "-o", str(out)]) == 0
    assert "heldout_relation" in capsys.readouterr().out
    record = json.loads((out / "scores.json").read_text())
    assert (record["run"], record["step"], record["ema"], record["prompts"]) == ("run", 7, True, 9)
    assert record["options"]["guidance"] == 1 and len(record["weights"]) == 16
    assert record["splits"]["seen"]["overall"]["mean"] == 0  # random weights paint no shapes
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in verdicts] == [prompt.text for prompt in benchmark(1)]
    assert np.load(out / "pictures.npy").shape == (9, 32, 32, 3)
    assert (out / "pictures.png").is_file()
    kept = read_scores(run, [])
    assert list(kept) == ["shapes, heldout kind", "shapes, heldout relation", "shapes, seen"]
    seen = kept["shapes, seen"][0]
    assert (seen.step, seen.prompts, seen.settings["guidance"], seen.overall.mean) == (7, 6, 1.0, 0)
    assert list(seen.parts)[:2] == ["single object", "two object"]


def test_a_world_is_made_and_the_detector_checked_from_the_command_line(world, tmp_path, capsys):
    options = ["--images", "3", "--pairs", "2", "--heldout", "1", "--processes", "1"]
    assert main(["shapes", "make", str(tmp_path / "w"), *options]) == 0
    assert f"--set data.pairs={tmp_path}/w/pairs/set.index" in capsys.readouterr().out
    assert main(["shapes", "check", "--scenes", "1"]) == 0
    assert capsys.readouterr().out.count("100.00%") == 18
    assert main(["shapes", "check", "--scenes", "1", "--codec", str(world / "vae")]) == 0
    assert "counting" in capsys.readouterr().out


def test_a_wrong_number_is_one_line(capsys, tmp_path):
    assert main(["shapes", "make", str(tmp_path / "w"), "--images", "-3"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("per_category", [0, 500])
def test_prompts_that_there_are_not_are_refused(per_category):
    with pytest.raises(ValueError, match="there are 48 different ones"):
        evaluate_shapes(None, None, EvaluationOptions(per_category=per_category))  # pyright: ignore[reportArgumentType]
