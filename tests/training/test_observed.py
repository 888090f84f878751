"""What a run tells while it trains: figures for Prometheus, traces, wandb; and who may read its folder."""

import gzip
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from iomm.config import Config
from iomm.evaluation.status import Follower
from iomm.parallel.mesh import Mesh
from iomm.training import train as loop
from iomm.training.profiler import ProfileWindow
from iomm.training.prometheus import PrometheusFile, exposition
from iomm.training.run import Run
from iomm.training.train import train
from tests.small_run import events, small_config

# One line of the text format: https://prometheus.io/docs/instrumenting/exposition_formats/
TEXT = r'"(\\.|[^"\\])*"'
LINE = re.compile(rf"# (HELP|TYPE) iomm_\w+ .+|iomm_\w+\{{run={TEXT}(,\w+={TEXT})*\}} [-+.e\w]+")


def figures(text: str) -> dict[str, float]:
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    """Three steps with everything on, and no held-out samples."""
    out = tmp_path_factory.mktemp("watched")
    settings = {"train__steps": 3, "train__profile_steps": [2, 2], "data__heldout": []}
    config = small_config(world, out, **settings, train__prometheus_file=str(out / "iomm.prom"))
    train(config)
    return config


def test_a_run_writes_its_figures_and_what_they_were_at_the_end(watched) -> None:
    text = Path(watched.train.prometheus_file).read_text()
    assert all(LINE.fullmatch(line) for line in text.splitlines()), text
    found = figures(text)
    assert found['iomm_step{run="run"}'] == found['iomm_steps_planned{run="run"}'] == 3
    assert found['iomm_checkpoint_step{run="run"}'] == 3 and found['iomm_loss{run="run"}'] > 0
    assert found['iomm_state{run="run",state="done"}'] == 1
    assert found['iomm_state{run="run",state="running"}'] == 0
    assert not any("mfu" in name for name in found)  # a CPU has no peak in the table
    assert [p.name for p in Path(watched.out_dir).iterdir()].count("iomm.prom") == 1


def test_a_trace_of_the_window_holds_the_loops_phases(watched) -> None:
    (noted,) = events(watched.run_dir, "profile")
    trace = watched.run_dir / "profile" / "steps_00000002-00000002_rank_00000.json.gz"
    assert noted["detail"] == str(trace) and noted["step"] == 3
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert all(names.count(phase) >= 1 for phase in ("batch", "encode", "step", "log"))
    assert "aten::addmm" in names or "aten::mm" in names


def test_a_runs_folder_is_private_and_says_which_code_made_it(watched) -> None:
    assert watched.run_dir.stat().st_mode & 0o777 == 0o700
    assert len(json.loads((watched.run_dir / "run.json").read_text())["code"]) == 12


def test_ranks_are_compared_before_anything_is_written(
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlike(config: Config) -> None:
        raise ValueError(f"the ranks of {config.name} are not alike")

    monkeypatch.setattr(loop, "require_agreement", unlike)
    with pytest.raises(ValueError, match="the ranks of run are not alike"):
        train(small_config(world, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_window_that_a_stop_cuts_short_is_written_and_one_that_fails_is_not(tmp_path: Path) -> None:
    device = torch.device("cpu")
    with ProfileWindow((5, 9), tmp_path, 3, device) as window:
        assert window.at(6) is None  # a run that resumes at step 6
        torch.ones(2).sum()
    names = [p.name for p in (tmp_path / "profile").iterdir()]
    assert names == ["steps_00000006-00000009_rank_00003.json.gz"]
    with pytest.raises(RuntimeError), ProfileWindow((1, 1), tmp_path, 0, device) as window:
        window.at(1)
        raise RuntimeError
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_without_a_window_nothing_is_recorded(tmp_path: Path) -> None:
    with ProfileWindow(None, tmp_path, 0, torch.device("cpu")) as window:
        assert window.at(1) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["figures.txt", "nowhere/iomm.prom"])
def test_a_file_that_the_collector_would_not_see_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"must be a file \*\.prom in a folder that exists"):
        PrometheusFile(str(tmp_path / name), tmp_path)


def test_figures_that_the_disk_does_not_take_are_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "iomm.prom").mkdir()
    PrometheusFile(str(tmp_path / "iomm.prom"), tmp_path).write()
    assert "iomm.prom is not written, training goes on" in caplog.text


def test_a_run_with_quotes_in_its_name_is_escaped_and_what_it_does_not_know_is_left_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": 'a "b" \\ c'}))
    text = exposition(Follower(tmp_path).read())
    assert 'iomm_restarts_total{run="a \\"b\\" \\\\ c"} 0.0' in text and "iomm_loss" not in text
    assert all(LINE.fullmatch(line) for line in text.splitlines()), text


@pytest.mark.parametrize("steps", ["[0, 3]", "[5, 4]"])
def test_a_window_that_is_none_is_refused_with_an_example(world, tmp_path: Path, steps: str) -> None:
    with pytest.raises(ValueError, match=r"train.profile_steps .* For three steps: \[11, 13\]"):
        small_config(world, tmp_path).override([f"train.profile_steps={steps}"])


class FakeWandb(types.ModuleType):
    """Keeps what it is told."""

    Settings = dict

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []

    def init(self, **settings: Any) -> "FakeWandb":
        self.started.append(settings)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None: ...


def test_a_resumed_run_keeps_its_wandb_id_and_another_folder_of_the_same_name_gets_its_own(
    world, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for out in ("a", "a", "b"):
        with Run(small_config(world, tmp_path / out, train__wandb="offline"), mesh) as run:
            run.log("train", 7, loss=0.5, tflops={"mllm": 1.0})
            run.event(7, "save")
    first, again, other = (settings["id"] for settings in fake.started)
    assert first == again != other and len(first) == 12
    assert fake.started[0]["mode"] == "offline" and fake.metrics[0] == ("*", "step")
    assert fake.logged == [{"step": 7, "train/loss": 0.5, "train/tflops/mllm": 1.0}] * 3
