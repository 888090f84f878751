"""The scripts in examples/slurm on a real SLURM: a job of two nodes is preempted, loses a node, and exports;
an array trains two configurations. One rank a node, gloo, pretend GPUs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from iomm.cli import main
from iomm.config import Config
from iomm.training.state import RunState, read_state
from tests.slurm.cluster import ENDS, Cluster, wait_until
from tests.small_run import config_file, events, losses, small_config

pytestmark = [pytest.mark.slurm, pytest.mark.multi, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
TWO_NODES = {
    "train__steps": 200,
    "train__micro_batch_images": 4,
    "train__save_every_steps": 50,
    "train__eval_every_steps": 1000,
    "train__sample_every_steps": 1000,
}
LIMIT_S = 180  # for anything that takes seconds on an idle machine


@pytest.fixture
def checkout(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, as a clone of the repository would be, and the environment to do it in."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    # All nodes are this machine, whose loopback they share; SLURM's names for them are known to SLURM alone.
    monkeypatch.setenv("RENDEZVOUS_HOST", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "kernels"))))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Life:
    """A run's folder, watched from outside, and its job's log."""

    cluster: Cluster
    job: str
    run_dir: Path
    log: Path

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else "(no log)"

    def state(self) -> RunState | None:
        return read_state(self.run_dir)

    def wait_for_state(
        self, state: str, restarts: int, step: int = 0, timeout_s: float = LIMIT_S
    ) -> RunState:
        def there() -> bool:
            self.cluster.hurry(self.job)
            job = self.cluster.job(self.job).get("JobState")
            assert job not in ENDS, f"{job}: {self.told()}"
            now = self.state()
            return now is not None and (now.state, now.restarts) == (state, restarts) and now.step >= step

        wait_until(
            there, timeout_s, lambda: f"{state} for the {restarts}. time: {self.state()}\n{self.told()}"
        )
        now = self.state()
        assert now is not None
        return now


def undisturbed(config: Config, folder: Path) -> Path:
    """The folder of the same run, trained on two ranks without SLURM."""
    config = config.override([f"out_dir={folder}"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "iomm.cli", "train", str(config_file(config, folder / "config.py"))]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return config.run_dir


def test_a_job_survives_preemption_and_a_lost_node_with_the_undisturbed_curve_and_exports(
    cluster, checkout, world, tmp_path_factory, capsys
):
    config = small_config(world, checkout / "runs", "chain", **TWO_NODES)
    file = config_file(config, checkout / "chain.py")
    command = ["launch", "slurm", str(file), "--nodes", "2", "--gpus-per-node", "1", "--partition", "low"]
    assert main([*command, "--sbatch", "mem=1000", "--set", "train.log_every_steps=1"]) == 0
    printed = capsys.readouterr().out
    job = re.search(r"^submitted job (\d+)$", printed, re.M)[1]
    run = Life(cluster, job, config.run_dir, config.run_dir / f"slurm-{job}.out")
    assert f"log: {run.log}\n" in printed
    export = cluster.run(
        *("sbatch", "--parsable", "--mem=1000", f"--dependency=afterok:{job}", "--output=export.out"),
        *("examples/slurm/export.sbatch", str(config.run_dir), "exported"),
    )

    first = run.wait_for_state("running", restarts=0, step=3)
    assert first.job == job
    # A job of a better partition wants all nodes: SLURM sends ours SIGUSR1, and waits.
    better = cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--mem=0"),
        *("--output=better.out", "--wrap", "srun true"),
    )
    preempted = run.wait_for_state("preempted", restarts=0)
    assert preempted.reason == "SIGUSR1" and 3 <= preempted.step < 200
    cluster.wait_for(better, {"COMPLETED"}, LIMIT_S)

    run.wait_for_state("running", restarts=1, step=preempted.step + 3)
    lost = cluster.job(job)["NodeList"].replace("n[", "").rstrip("]").replace("n", "")[-1]
    cluster.crash(f"n{lost}")
    # The curve to compare with is trained while SLURM finds out about the node, which takes it half a minute.
    straight = undisturbed(config, tmp_path_factory.mktemp("straight"))
    cluster.wait_for(job, {"COMPLETED"}, 2 * LIMIT_S)

    done = run.state()
    assert (done.state, done.step, done.restarts) == ("done", 200, 2), run.told()
    assert f"n{lost}" not in cluster.job(job)["NodeList"]
    assert [e["step"] for e in events(config.run_dir, "resume")][0] == preempted.step
    assert losses(config.run_dir) == losses(straight)
    assert not list(checkout.glob("*.requeue"))

    cluster.wait_for(export, {"COMPLETED"}, LIMIT_S)
    assert (checkout / "exported" / "transformer").is_dir(), (checkout / "export.out").read_text()


def test_an_array_trains_first_stages_and_then_the_second_stage_that_starts_from_one(
    cluster, checkout, world
):
    short = {"train__steps": 2, "train__eval_every_steps": 1000, "train__sample_every_steps": 1000}
    settings: dict[str, dict[str, object]] = {
        "image": {"data__mix_ratio": 1.0},
        "pair": {"data__mix_ratio": 0.0},
        "image_mix": {"data__mix_ratio": 0.5, "train__init_from": "runs/image"},
    }
    for name, own in settings.items():
        config_file(small_config(world, Path("runs"), name, **short, **own), checkout / f"{name}.py")
    submit = ("sbatch", "--parsable", "--gpus-per-node=1", "--mem=1000", "--output=%A_%a.out")
    script = "examples/slurm/array_recipes.sbatch"
    common = ("--", "--set", "train.seed=3")
    first = cluster.run(*submit, "--array=0-1", script, "image.py", "pair.py", *common)
    second = cluster.run(
        *submit, f"--dependency=afterok:{first}", "--array=0", script, "image_mix.py", *common
    )
    cluster.wait_for(second, {"COMPLETED"}, LIMIT_S)
    for name, job in (("image", f"{first}_0"), ("pair", f"{first}_1"), ("image_mix", f"{second}_0")):
        state = read_state(Path("runs") / name)
        assert state is not None, (checkout / f"{job}.out").read_text()
        assert (state.state, state.step, state.job) == ("done", 2, job)
        written = json.loads((checkout / "runs" / name / "run.json").read_text())
        assert written["config"]["train"]["seed"] == 3
