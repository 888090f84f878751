"""`iomm launch slurm`: what it writes into the script, what it refuses, and what it says; no SLURM needed."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from iomm.cli import main
from iomm.launch.script import find_script, render
from tests.small_run import config_file, small_config

SCRIPT = find_script("train.sbatch").read_text()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return config_file(
        small_config(tmp_path, tmp_path / "runs", "toy", train__global_batch_images=64), tmp_path / "toy.py"
    )


def dry_run(file: Path, capsys, *options: str) -> str:
    assert main(["launch", "slurm", str(file), "--dry-run", *options]) == 0
    return capsys.readouterr().out


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.M))


def test_options_replace_the_script_s_own_lines_or_are_added_and_the_rest_stays(file, capsys):
    script = dry_run(
        file, capsys, "--nodes=8", "--gpus-per-node=1", "--partition=best", "--sbatch", "qos=long"
    )
    ours, theirs = directives(script), directives(SCRIPT)
    assert ours["nodes"] == "8" and ours["partition"] == "best" and ours["qos"] == "long"
    assert ours["output"].endswith("runs/toy/slurm-%j.out") and ours["job-name"] == "toy"
    kept = {"signal", "requeue", "open-mode", "exclusive", "ntasks-per-node", "time"}
    assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    filled_in, original = script.splitlines(), SCRIPT.splitlines()
    assert [line for line in original if line not in filled_in and "#SBATCH" not in line] == []


def test_the_run_s_arguments_are_quoted_into_the_script(file, capsys):
    setting = 'data.images=["/a b/$x\'.tar"]'
    script = dry_run(file, capsys, "--set", setting, "--set", "train.seed=3", "--python", "python3")
    lines = script.splitlines()
    at = lines.index("# Filled in by `iomm launch slurm`.")
    shell = "\n".join([*lines[at : at + 3], 'printf "%s\\n" "$PYTHON" "$@"'])
    printed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["python3", str(file), "--set", setting, "--set", "train.seed=3"]


def test_a_container_brings_its_own_python(file, capsys):
    script = dry_run(file, capsys, "--container-image=iomm.sqsh", "--container-mounts=/data:/data")
    assert "export PYTHON=python3\n" in script
    assert "export CONTAINER_IMAGE=iomm.sqsh\nexport CONTAINER_MOUNTS=/data:/data\n" in script


def test_a_filled_in_script_is_one_that_bash_can_read(file, capsys):
    script = dry_run(file, capsys, "--time=1:00:00", "--account=me", "--dependency=afterok:7")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_an_option_without_a_value_is_written_without_one():
    script = render("#!/bin/sh\n#SBATCH --mem=0\ntrue\n", {"hold": None, "mem": "5"}, {}, ["a.py"])
    assert script.startswith("#!/bin/sh\n#SBATCH --mem=5\n#SBATCH --hold\n")
    assert script.endswith("set -- a.py\ntrue\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes=3", "--gpus-per-node=1"], "global_batch_images 64 is not divisible .* 8*3 = 24"),
        (["--gpus-per-node=3", "--set", "parallel.tp=2"], r"3 GPUs are not divisible by tp\*pp = 2\*1"),
        (["--nodes=0"], "0 GPUs cannot train"),
        (["--gpus-per-node=1", "--set", "train.stepz=1"], "Did you mean train.steps"),
        (["--gpus-per-node=1"], "sbatch is not on the PATH"),
    ],
)
def test_what_could_not_run_is_refused_before_it_is_submitted(file, capsys, monkeypatch, options, message):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", str(file), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message.replace("8*3", r"8\*3"), line), line
    assert not (file.parent / "runs").exists()


def fake_sbatch(folder: Path, script: str, monkeypatch) -> None:
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_submitting_says_the_job_and_its_log_and_keeps_the_script(file, capsys, monkeypatch):
    fake_sbatch(file.parent / "bin", 'echo "$@" >"$0.told"; echo "77;cluster"', monkeypatch)
    assert main(["launch", "slurm", str(file), "--gpus-per-node=1"]) == 0
    run = file.parent / "runs" / "toy"
    printed = capsys.readouterr().out
    assert printed.startswith(f"submitted job 77\nlog: {run}/slurm-77.out\nscript: {run}/slurm.sbatch\n")
    assert (file.parent / "bin" / "sbatch.told").read_text() == f"--parsable {run}/slurm.sbatch\n"
    assert (run / "slurm.sbatch").read_text().startswith("#!/usr/bin/env bash\n")


def test_what_sbatch_says_against_a_job_is_passed_on(file, capsys, monkeypatch):
    fake_sbatch(file.parent / "bin", "echo 'invalid partition' >&2; exit 1", monkeypatch)
    assert main(["launch", "slurm", str(file), "--gpus-per-node=1"]) == 1
    assert "invalid partition" in capsys.readouterr().err
