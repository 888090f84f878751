"""The six recipes: which runs there are, what each needs, what is left to do, the table of their scores."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from iomm.cli import load_config
from iomm.evaluation.shapes.prompts import SPLITS
from tools.recipes import MAKE, ROOT, Bench, Run, ablation, main, mask_sweep, mix_sweep, other_mllm, six
from tools.recipes_table import rows, write_results


def finish(bench: Bench, run: Run) -> None:
    config = bench.config(run)
    config.run_dir.mkdir(parents=True)
    state = {"state": "done", "step": config.train.steps}
    (config.run_dir / "run_state.json").write_text(json.dumps(state))


def score(bench: Bench, run: Run, right: float) -> None:
    """A score file as `iomm evaluate shapes` writes it: of 10 prompts a category, this share is right."""
    file = bench.score_file(run)
    file.parent.mkdir(parents=True)
    lines = []
    for split, categories in SPLITS.items():
        for category in categories:
            for number in range(10):
                line = {"split": split, "tag": category, "number": len(lines), "correct": number < 10 * right}
                lines.append(json.dumps(line))
    (file.parent / "verdicts.jsonl").write_text("\n".join(lines))
    file.write_text(json.dumps({"splits": {"seen": {"overall": {"mean": right}}}}))


def log_losses(bench: Bench, run: Run, losses: list[float]) -> None:
    """A run's log with one evaluation, as `iomm train` writes it."""
    config = bench.config(run)
    config.run_dir.mkdir(parents=True)
    times = [(i + 0.5) / len(losses) for i in range(len(losses))]
    line = {"kind": "eval", "step": 3750, "timesteps": times, "by_timestep": {"text": losses}}
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_the_six_recipes_share_two_first_stages_a_seed_and_cost_the_same():
    runs = six(2)
    assert len(runs) == 12
    assert len({run.origin for run in runs}) == 4
    configs = [run.config() for run in runs]
    assert len({config.run_dir for config in configs}) == 12
    for run, config in zip(runs, configs, strict=True):
        assert run.origin is not None
        first = run.origin.config()
        assert config.train.init_from == str(first.run_dir)
        assert config.train.seed != first.train.seed
        assert first.data.mix_ratio == {"image": 1.0, "pair": 0.0}[run.first]
        assert config.data.mix_ratio == {"image": 1.0, "pair": 0.0, "mix": 0.5}[run.second or ""]
    assert len({(c.train.steps, c.train.global_batch_images, c.generator) for c in configs}) == 1


def test_the_files_in_examples_are_the_recipes_of_seed_0():
    for run in six(1):
        for one in (run, run.origin):
            assert one is not None
            name = one.first if one.second is None else f"{one.first}_{one.second}"
            assert load_config(ROOT / "examples" / "configs" / "recipes" / f"{name}.py") == one.config()


def test_variants_have_first_stages_with_their_own_settings():
    for run in (*ablation(1)[:2], *mask_sweep(1)):
        origin = run.origin
        assert origin is not None
        assert origin.config().condition == run.config().condition
        assert run.config().train.init_from == str(origin.config().run_dir)
    # The mix ratio is the second stage's alone: all share the recipe's first stage.
    assert {run.origin for run in mix_sweep(1)} == {Run("image", None, 0)}
    assert Run("image", "mix", 0) in mix_sweep(1)  # the recipe's own ratio is not trained a second time
    every = [run for make in MAKE.values() for run in make(2)]
    runs = {*every, *(origin for run in every if (origin := run.origin))}
    assert len({run.config().run_dir for run in runs}) == len(runs)


def test_a_run_finished_at_another_length_is_refused_with_the_way_out(tmp_path: Path):
    run = Run("image", "mix", 1)
    finish(Bench(tmp_path, ["train.steps=3"]), run)
    message = "image_mix-seed1 was trained for 3 steps, now it has 4. Move .*image_mix-seed1 .* away"
    with pytest.raises(RuntimeError, match=message):
        Bench(tmp_path, ["train.steps=4"]).work([run], 1, print)


def test_what_is_left_to_do_follows_from_the_files(tmp_path: Path):
    bench, run = Bench(tmp_path, ["train.steps=3"]), Run("image", "mix", 1)
    command = bench.next_command(run)
    assert command is not None and "train" in command
    bench.write_config(run)
    assert load_config(Path(command[-1])) == bench.config(run)
    assert bench.config(run).train.steps == 3
    finish(bench, run)
    command = bench.next_command(run)
    assert command is not None and command[3:5] == ["evaluate", "shapes"]
    score(bench, run, 0.5)
    assert bench.next_command(run) is None
    first = run.origin
    assert first is not None and "train" in (bench.next_command(first) or ())
    finish(bench, first)
    assert bench.next_command(first) is None  # a first stage alone is not scored


def test_a_failed_run_ends_the_work_and_names_its_log(tmp_path: Path):
    bench = Bench(tmp_path, ["train.steps=2"])
    with pytest.raises(RuntimeError, match=r"image-seed0 failed: see .*image-seed0.log"):
        bench.work([Run("image", "pair", 0)], 1, lambda line: None)  # there is nothing
    assert "no autoencoder" in bench.log(Run("image", None, 0)).read_text()


def test_a_stop_signal_lets_the_runs_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    began, saved = tmp_path / "began", tmp_path / "saved"
    run = (
        "import pathlib, signal, sys, time\n"
        f"save = lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit())\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(began)!r}).touch()\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(Bench, "make_shards", lambda *_: None)
    monkeypatch.setattr(Bench, "next_command", lambda *_: [sys.executable, "-c", run])
    monkeypatch.setattr(Bench, "log", lambda *_: tmp_path / "log")

    def stop() -> None:
        while not began.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        threading.Thread(target=stop).start()
        assert main(["--seeds", "1", "--jobs", "1"]) == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert saved.exists()


def test_another_mllm_that_is_not_there_is_asked_for_with_the_command_that_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("tools.recipes.ROOT", tmp_path)
    monkeypatch.setattr("tools.recipes.OTHER_MLLM", tmp_path / "mllm")
    with pytest.raises(SystemExit):
        main(["--set", "mllm"])
    assert "python -m examples.tiny.train_mllm --aligned" in capsys.readouterr().err
    runs = other_mllm(2)
    assert [(run.first, run.second, run.seed) for run in runs] == [
        (r.first, r.second, r.seed) for r in six(2)
    ]
    origin = runs[0].origin
    assert origin is not None
    assert origin.config().mllm.path == str(tmp_path / "mllm")


def test_the_table_has_means_over_seeds_and_leaves_out_what_is_not_scored(tmp_path: Path):
    bench, runs = Bench(tmp_path), six(2)
    for run in runs:
        if (run.first, run.second) == ("image", "mix"):
            score(bench, run, 0.8 if run.seed else 0.6)
            log_losses(bench, run, [1.0, 0.5 if run.seed else 0.7, 0.3])
    score(bench, runs[0], 1.0)  # one seed of two
    (row,) = rows(bench, runs)
    assert (row.name, row.seeds) == ("image+mix", 2)
    assert row.by_seed == pytest.approx([0.6, 0.8])
    assert row.splits["seen"].mean == pytest.approx(0.7)
    assert row.splits["seen"].low < 0.7 < row.splits["seen"].high
    assert row.losses == [pytest.approx((2 / 3, 0.5)), pytest.approx((0.6, 0.4))]
    assert set(row.categories) == set(SPLITS["seen"])
    table = write_results(bench, "recipes", runs).read_text()
    assert (
        "| image+mix | 0.70 (" in table
        and "| 0.633 | 0.450 | 0.89 |" in table
        and "5 more are not trained yet" in table
    )
    assert (tmp_path / "examples" / "recipes" / "recipes.svg").is_file()


def test_a_table_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no run of 'mix' is scored"):
        write_results(Bench(tmp_path), "mix", mix_sweep(1))
