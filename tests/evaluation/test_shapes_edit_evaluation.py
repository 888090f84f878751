"""`iomm evaluate shapes --edits`, from the command line to the files."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from iomm.cli import main
from iomm.evaluation.scores import read_scores
from iomm.evaluation.shapes import edit_evaluation
from iomm.evaluation.shapes.edit_evaluation import EditOptions, describe_edits, evaluate_edits
from iomm.evaluation.shapes.edits import draw_edit
from iomm.evaluation.shapes.scene import render
from tests.random_run import save_random_run
from tests.small_run import small_config


def pretended(image_px: int, tokens: int):
    """What of a system and its encoders the benchmark looks at before it edits."""
    data = SimpleNamespace(image_px=image_px)
    system = SimpleNamespace(config=SimpleNamespace(data=data))
    return system, SimpleNamespace(mllm=SimpleNamespace(image_tokens=tokens))


def test_a_perfect_editor_scores_one_whatever_the_batch(monkeypatch):
    """Every scene goes to the editor with its own instruction and mask, each edit numbered once."""
    cases = [draw_edit(2, n) for n in range(10)]
    calls = []

    def edit(system, encoders, image_BCHW, instructions, keep_BN, *, first, **settings):
        calls.append((first, settings, keep_BN))
        here = cases[first : first + len(instructions)]
        assert instructions == [case.text for case in here]
        sources = np.stack([render(case.source, 48) for case in here])
        assert np.array_equal(image_BCHW.permute(0, 2, 3, 1).numpy(), sources)
        pictures = [render(case.target, 48) for case in here]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    monkeypatch.setattr(edit_evaluation, "edit", edit)
    options = EditOptions(per_action=2, seed=2, batch_images=6, mask_ratio=0.25, text_guidance=4.0)
    edited = evaluate_edits(*pretended(48, 400), options)
    assert (edited.score.overall.mean, edited.score.kept.mean) == (1, 1)
    assert [call[0] for call in calls] == [0, 6]
    assert calls[0][1]["text_guidance"] == 4.0
    keep_NT = torch.cat([call[2] for call in calls])
    assert keep_NT.shape == (10, 400) and 0.7 < keep_NT.float().mean() < 0.8
    assert "  recolour        1.000  [1.000, 1.000]\n" in describe_edits(edited.score)


def test_a_checkpoint_is_scored_from_the_command_line(world, mesh, tmp_path, capsys):
    run = save_random_run(small_config(world, tmp_path))
    out = tmp_path / "scores"
    options = ["--edits", "--per-category", "1", "--steps", "1", "--batch", "3", "--mask-ratio", "0.25"]
    assert main(["evaluate", "shapes", str(run), *options, "--guidance", "2", "-o", str(out)]) == 1
    assert main(["evaluate", "shapes", str(run), *options, "--batch", "0", "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert "leave --guidance and --images-per-prompt out" in said and "--batch 0 must be at least 1" in said
    assert main(["evaluate", "shapes", str(run), *options, "-o", str(out)]) == 0
    assert "rest kept" in capsys.readouterr().out
    record = json.loads((out / "edits.json").read_text())
    assert (record["run"], record["step"], record["options"]["mask_ratio"]) == ("run", 7, 0.25)
    [kept] = read_scores(Path(record["run_dir"]), [])["shapes, edits"]
    assert (kept.prompts, kept.settings["mask ratio"]) == (5, 0.25) and "recolour" in kept.parts
    assert record["overall"]["mean"] == 0 and len(record["actions"]) == 5  # random weights paint no shapes
    lines = [json.loads(line) for line in (out / "edit_verdicts.jsonl").read_text().splitlines()]
    assert [line["instruction"] for line in lines] == [draw_edit(0, n).text for n in range(5)]
    assert all(line["reason"] for line in lines)
    assert np.load(out / "edits.npy").shape == (5, 32, 32, 3)
    assert (out / "edits.png").is_file()


def test_no_edits_at_all_are_refused():
    with pytest.raises(ValueError, match="ask for at least one"):
        evaluate_edits(*pretended(32, 4), EditOptions(per_action=0))
