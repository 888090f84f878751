"""The launch scripts run by bash, with stand-ins for SLURM's commands that write down what they are told."""

import os
import subprocess
from pathlib import Path

import pytest

from iomm.launch.script import find_script

SCRIPTS = find_script("train.sbatch").parent
# What these do instead: write down what they are told, and
# srun: play the ranks: with $WAITS be signalled and wait until the signal is handed on (5 s at most), leave
# $LEAVES in the file that rank 0 writes, exit with $STATUS; asked whether all nodes answer, with $SILENT.
STAND_INS = {
    "srun": r"""
        [ "$1" != --overlap ] || exit "${SILENT:-0}"
        printf '%s\n' "$@" >srun.told
        if [ -n "${WAITS:-}" ]; then
            kill -USR1 $PPID
            for _ in {1..100}; do [ -e scancel.told ] || command -p sleep 0.05; done
        fi
        [ -z "${LEAVES:-}" ] || echo "$LEAVES" >"$IOMM_REQUEUE_FILE"
        exit "${STATUS:-0}"
    """,
    "scancel": 'echo "$@" >>scancel.told',
    "sleep": 'echo "$@" >>sleep.told',
    "scontrol": r"""
        echo "$@" >>scontrol.told
        case "$*" in
            "show hostnames"*) printf 'node7\nnode8\n' ;;
            *"show job"*)
                echo "JobId=41 JobState=${STATE:-RUNNING} PreemptTime=${PREEMPTED:-None} Partition=low" ;;
            requeue*) exit "${REFUSES:-0}" ;;
        esac
    """,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(SCRIPTS.parent)
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    slurm = {
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_ON_NODE": "64",
        "SLURM_GPUS_ON_NODE": "8",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        env=slurm | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
    )


def told(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.told"
    return path.read_text().splitlines() if path.exists() else []


def test_train_starts_one_torchrun_a_node_that_meets_on_the_first(folder):
    done = run(folder, "train.sbatch", "a.py", "--set", "name=x y")
    assert done.returncode == 0, done.stderr
    words = told(folder, "srun")
    assert words[words.index("env") : words.index("env") + 3] == [
        "env",
        "--block-signal=USR1",
        ".venv/bin/python",
    ]
    for word in ("--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node7:20410", "--rdzv-id=41.0"):
        assert word in words
    assert words[-4:] == ["train", "a.py", "--set", "name=x y"]
    assert not any(line.startswith("requeue") for line in told(folder, "scontrol"))


def test_a_job_s_second_life_meets_elsewhere_and_kinds_of_gpus_are_no_number(folder):
    environment = {"SLURM_RESTART_COUNT": "3", "SLURM_GPUS_PER_NODE": "h800:4", "RENDEZVOUS_HOST": "ib7"}
    run(folder, "train.sbatch", "a.py", **environment)
    words = told(folder, "srun")
    for word in ("--nproc-per-node=4", "--rdzv-endpoint=ib7:20413", "--rdzv-id=41.3"):
        assert word in words


@pytest.mark.parametrize("script", ["train.sbatch", "export.sbatch"])
def test_a_container_is_pyxis_options_of_srun_and_none_without(folder, script):
    arguments, environment = ["run", "out"], {"SLURM_CPUS_PER_TASK": "8"}
    run(folder, script, *arguments, **environment)
    assert not any("container" in word for word in told(folder, "srun"))
    run(folder, script, *arguments, **environment, CONTAINER_IMAGE="x.sqsh", CONTAINER_MOUNTS="/d:/d")
    words = [word for word in told(folder, "srun") if "container" in word]
    mounts = f"--container-mounts={folder}:{folder},/d:/d"
    assert words == ["--container-image=x.sqsh", f"--container-workdir={folder}", mounts]


@pytest.mark.parametrize(
    ("environment", "status", "requeues"),
    [
        ({"LEAVES": "SIGUSR1"}, 0, True),
        ({"LEAVES": "SIGUSR1", "REFUSES": "1"}, 85, True),
        ({"LEAVES": "SIGUSR1", "SLURM_RESTART_COUNT": "100"}, 0, False),
        ({"LEAVES": "SIGTERM", "STATUS": "1"}, 1, False),
        ({"LEAVES": "SIGTERM", "STATUS": "1", "PREEMPTED": "2026-01-01T00:00:00"}, 0, True),
        ({"LEAVES": "saved", "STATUS": "1", "STATE": "COMPLETING"}, 1, False),
        ({"LEAVES": "saved"}, 0, False),
        ({"LEAVES": "saved", "STATUS": "3"}, 0, True),
        ({"STATUS": "3"}, 3, False),
        ({"STATUS": "3", "SILENT": "1"}, 0, True),
    ],
    ids=[
        "asked",
        "may-not-requeue",
        "for-ever",
        "terminated",
        "preempted",
        "cancelled",
        "done",
        "failed-after-progress",
        "failed-without",
        "node-lost",
    ],
)
def test_a_job_goes_back_into_the_queue_if_another_life_would_get_further(
    folder, environment, status, requeues
):
    done = run(folder, "train.sbatch", "a.py", **environment)
    assert done.returncode == status, done.stderr
    assert ("requeue 41" in told(folder, "scontrol")) == requeues
    assert told(folder, "sleep") == (["900"] if "SILENT" in environment else [])  # for SLURM to notice
    assert not list(folder.glob("*.requeue"))


def test_what_a_life_before_left_does_not_count(folder):
    (folder / "slurm-41.requeue").write_text("SIGUSR1\n")
    assert run(folder, "train.sbatch", "a.py", STATUS="1").returncode == 1
    assert not list(folder.glob("*.requeue"))


def test_sigusr1_is_handed_on_to_the_ranks_while_srun_runs_and_its_status_kept(folder):
    done = run(folder, "train.sbatch", "a.py", WAITS="yes", LEAVES="SIGUSR1")
    assert told(folder, "scancel") == ["--signal=USR1 41.0"]
    assert done.returncode == 0 and "requeue 41" in told(folder, "scontrol")
    assert run(folder, "train.sbatch", "a.py", WAITS="yes", STATUS="5").returncode == 5


def test_an_array_element_trains_its_configuration_with_everybody_s_settings(folder):
    arguments = ["a.py", "b.py", "--", "--set", "train.steps=1"]
    done = run(folder, "array_recipes.sbatch", *arguments, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    assert told(folder, "srun")[-4:] == ["train", "b.py", "--set", "train.steps=1"]


def test_an_array_element_without_a_configuration_says_so(folder):
    done = run(folder, "array_recipes.sbatch", "a.py", "b.py", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 2 and "--array=0-1" in done.stderr
    assert not told(folder, "srun")


def test_export_needs_a_run_and_a_place(folder):
    assert run(folder, "export.sbatch", "runs/x").returncode == 2
    run(folder, "export.sbatch", "runs/x", "out", "--dtype", "bf16", SLURM_CPUS_PER_TASK="8")
    assert told(folder, "srun")[-6:] == ["export", "runs/x", "-o", "out", "--dtype", "bf16"]
