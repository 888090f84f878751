"""`iomm evaluate generate` and `iomm evaluate read`, from the command line to the files."""

import json

import numpy as np
import pytest
from PIL import Image

from iomm.checkpoint.generator import open_generator
from iomm.cli import main
from iomm.evaluation.benches.command import shipped_prompts
from iomm.evaluation.benches.geneval import GENEVAL
from iomm.evaluation.benches.imgedit import IMGEDIT
from iomm.evaluation.benches.judges import Endpoint
from iomm.evaluation.benches.layout import BenchError, load_prompts
from iomm.sampling import paint
from tests.evaluation.benches import bench_files as small
from tests.random_run import save_random_run
from tests.small_run import draw_png, small_config


@pytest.fixture(scope="module")
def run(world, mesh, tmp_path_factory):
    """A run's folder with random weights."""
    return save_random_run(small_config(world, tmp_path_factory.mktemp("run")))


def generate(run, out, *options):
    return main(["evaluate", "generate", str(run), "-o", str(out), "--steps", "1", *map(str, options)])


def test_the_shipped_prompts_are_genevals_553():
    items = load_prompts(GENEVAL, shipped_prompts("geneval"))
    counts = [sum(item.category == tag for item in items) for tag in small.TAGS]
    assert counts == [80, 99, 80, 94, 100, 100]
    known = {0: "a photo of a bench", 104: "a photo of a zebra and a bed", 179: "a photo of two clocks"}
    assert {n: items[n].text for n in known} == known
    with pytest.raises(BenchError, match="the prompts of wise do not come with iomm"):
        shipped_prompts("wise")


def test_generated_pictures_are_those_of_paint_and_their_score_is_left_to_the_run(run, tmp_path, capsys):
    """One shift of timesteps and g as in v_null + g (v - v_null): whatever `paint` does, and nothing more."""
    prompts, out = small.geneval_prompts(tmp_path / "prompts.jsonl"), tmp_path / "out"
    options = [
        "--bench",
        "geneval",
        "--prompts",
        prompts,
        "--subset",
        "--batch",
        2,
        "--guidance",
        2,
        "--seed",
        5,
    ]
    assert generate(run, out, *options) == 0
    assert "7 prompts, 7 painted now" in capsys.readouterr().out
    _, encoders, system = open_generator(run, ema=True)
    texts = ["a photo of bench 6"] * 4
    alone = paint(system, encoders, texts, seed=5, steps=1, guidance=2.0, first=24)[1]
    with Image.open(out / "00006/samples/00001.png") as image:
        assert (np.asarray(image) == alone.permute(1, 2, 0).numpy()).all()
    record = json.loads((tmp_path / "out.run.json").read_text())
    assert record["sampling"]["guidance"] == 2 and record["prompts"]["painted"] == "original"
    assert record["checkpoint"]["step"] == 7 and len(record["checkpoint"]["weights"]) == 16

    results = tmp_path / "results.jsonl"
    lines = [
        {"filename": f"out/{n:05d}/samples/{i:05d}.png", "tag": small.TAGS[n % 6], "correct": n == 0}
        for n in range(7)
        for i in range(4)
    ]
    results.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    read = ["evaluate", "read", "--bench", "geneval", str(results), "--generated", str(out)]
    assert main([*read, "--judge", "Mask2Former of 2022-05-04"]) == 0
    printed = capsys.readouterr().out
    assert "compares with nothing" in printed and "geneval: 7 of 7 prompts scored" in printed
    scores = json.loads((tmp_path / "out.scores.json").read_text())
    assert scores["overall"]["mean"] == pytest.approx(0.5 / 6) and scores["judge"].startswith("Mask2Former")
    [left] = (run / "scores").glob("geneval-00000007-*.json")
    assert json.loads(left.read_text())["settings"]["sampling"]["seed"] == 5
    record = json.loads((tmp_path / "out.run.json").read_text())
    record["checkpoint"]["ema"] = False  # as `generate --raw` writes it
    (tmp_path / "out.run.json").write_text(json.dumps(record))
    assert main([*read, "--judge", "Mask2Former of 2022-05-04"]) == 0
    assert len(list((run / "scores").glob("geneval-00000007-*.json"))) == 2
    capsys.readouterr()
    assert main(["evaluate", "read", "--bench", "dpg", str(results), "--generated", str(out)]) == 1
    assert "was generated for geneval, not dpg" in capsys.readouterr().err


def test_edits_are_generated_from_the_originals(run, tmp_path, capsys):
    edits = small.imgedit_prompts(tmp_path / "basic_edit.json")
    originals, out = tmp_path / "originals", tmp_path / "out"
    options = ["--bench", "imgedit", "--prompts", edits, "--subset"]
    assert generate(run, out, *options) == 1
    assert generate(run, out, *options, "--originals", originals) == 1
    said = capsys.readouterr().err
    assert "--originals FOLDER" in said and "lacks 3 images to edit: animal/1.jpg" in said
    for i, item in enumerate(load_prompts(IMGEDIT, edits, subset=True)):
        path = originals / str(item.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_png(i))
    assert generate(run, out, *options, "--originals", originals) == 0
    assert sorted(path.name for path in out.iterdir()) == ["1068.png", "1082.png", "673.png"]


def test_a_prompt_that_is_too_long_is_named_before_anything_is_painted(run, tmp_path, capsys):
    folder = small.dpg_prompts(tmp_path / "prompts")
    (folder / "COCOval1.txt").write_text("long " * 500)
    assert generate(run, tmp_path / "out", "--bench", "dpg", "--prompts", folder, "--subset") == 1
    assert "prompt COCOval1: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_is_scored_from_the_command_line_and_what_is_lacking_is_said(
    run, tmp_path, capsys, monkeypatch
):
    """By a fake judge that says no to all: the endpoint itself is tested apart."""
    prompts, out = small.dpg_prompts(tmp_path / "prompts"), tmp_path / "out"
    assert generate(run, out, "--bench", "dpg", "--prompts", prompts, "--subset", "--guidance", 1) == 0
    assert f"--image-root-path {out} --resolution 32 --pic-num 4" in capsys.readouterr().out
    score = ["evaluate", "score", str(out), "--bench", "dpg", "--prompts", str(prompts)]
    monkeypatch.delenv("IOMM_JUDGE_URL", raising=False)
    assert main(score) == 1
    told = [*score, "--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "m"]
    assert main(told) == 1
    assert main([*told, "--judge-folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "leave --judge-url and --judge-model out" in said
    assert "--judge-url URL (or IOMM_JUDGE_URL)" in said and "dpg needs --questions PATH" in said
    monkeypatch.setattr(Endpoint, "ask", lambda self, ask: "no")
    questions = small.dpg_questions(tmp_path / "dpg_bench.csv")
    assert main([*told, "--questions", str(questions)]) == 0
    scores = json.loads((tmp_path / "out.scores.json").read_text())
    assert (
        scores["overall"]["mean"] == 0 and scores["judge"] == "m at 127.0.0.1:1/v1" and scores["scored"] == 3
    )
    (prompts / "COCOval0.txt").write_text("another prompt")
    assert main([*told, "--questions", str(questions)]) == 1
    (out / "COCOval1.png").unlink()
    (prompts / "COCOval0.txt").write_text("A long prompt, number 0.\n")
    assert main([*told, "--questions", str(questions)]) == 1
    said = capsys.readouterr().err
    assert "is not what" in said and "1 files are missing or damaged (COCOval1.png)" in said
