"""The command line in its own process: exit status, one line for bad input, kills, signals, several ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from iomm.cli import main
from tests.small_run import config_file, draw_png, losses, small_config

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}


def iomm(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "iomm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "iomm.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def png_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    while process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and max(losses(run_dir), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended before step {step}: {process.communicate()[1]}")


LONG = {
    "train__steps": 40,
    "train__save_every_steps": 5,
    "train__eval_every_steps": 100,
    "data__mix_ratio": 0.5,
}


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """A run of 40 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    config = small_config(world, folder, **LONG)
    done = iomm("train", config_file(config, folder / "config.py"))
    assert done.returncode == 0, done.stderr
    return config


def test_help_needs_none_of_the_heavy_imports():
    code = "import sys, iomm.cli; iomm.cli._parser().format_help(); print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    loaded = set(out.stdout.split())
    assert not loaded & {
        "torch",
        "megatron",
        "transformers",
        "diffusers",
        "numpy",
        "rich",
        "wandb",
        "matplotlib",
    }


def test_kill_9_in_mid_training_leaves_no_trace_in_the_rest_of_the_curve(straight, world, tmp_path):
    config = small_config(world, tmp_path, **LONG)
    file = config_file(config, tmp_path / "config.py")
    process = start("train", file)
    wait_for_step(process, config.run_dir, 12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert max(losses(config.run_dir)) < 40
    again = iomm("train", file)
    assert again.returncode == 0, again.stderr
    assert losses(config.run_dir) == losses(straight.run_dir)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_and_says_how_to_go_on(straight, world, tmp_path, number, status):
    config = small_config(world, tmp_path, **LONG)
    file = config_file(config, tmp_path / "config.py")
    process = start("train", file)
    wait_for_step(process, config.run_dir, 7)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == status
    said = re.search(r"after step (\d+), saved\. Go on with: iomm train (\S+)", stderr)
    assert said is not None, stderr
    assert (config.run_dir / "checkpoints" / f"step_{int(said[1]):08d}").is_dir()
    assert Path(said[2]) == file
    assert iomm("train", file).returncode == 0
    assert losses(config.run_dir) == losses(straight.run_dir)


@pytest.mark.multi
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (2, 2)])
def test_two_ranks_give_the_curve_of_one(straight, world, tmp_path, ranks, tp):
    settings = {**LONG, "train__steps": 12, "train__micro_batch_images": 4, "parallel__tp": tp}
    one = {step: loss for step, loss in losses(straight.run_dir).items() if step <= 12}
    config = small_config(world, tmp_path, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "iomm.cli", "train", str(config_file(config, tmp_path / "config.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert losses(config.run_dir) == pytest.approx(one, rel=1e-4)


def test_sample_reconstruct_and_report_work_on_a_finished_run(straight, tmp_path):
    grid = tmp_path / "grid.png"
    prompts = ("--prompt", "red ball", "--prompt", "gold ball")
    done = iomm("sample", straight.run_dir, *prompts, "--steps", 2, "-o", grid)
    assert done.returncode == 0, done.stderr
    width, height = png_size(grid)
    assert width > height
    image = tmp_path / "image.png"
    image.write_bytes(draw_png(3))
    out = tmp_path / "out.png"
    options = ("--mask-ratio", 0.5, "--steps", 2, "--method", "heun")
    done = iomm("reconstruct", straight.run_dir, image, *options, "-o", out)
    assert done.returncode == 0, done.stderr
    assert png_size(out)[0] > 0
    done = iomm("report", straight.run_dir)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip()).read_text()
    assert "velocity" in page
    assert not re.search(r"""(src|href)=["']?http""", page)


def test_the_same_seed_paints_the_same_picture_and_another_seed_another(straight, tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        files.append(tmp_path / f"{name}.png")
        options = ["--prompt", "red ball", "--steps", "2", "--seed", str(seed)]
        assert main(["sample", str(straight.run_dir), *options, "-o", str(files[-1])]) == 0
    a, b, c = (file.read_bytes() for file in files)
    assert a == b != c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "optimizer.lrr=1"], r"unknown setting optimizer\.lrr\. Did you mean optimizer\.lr\?"),
        (["--set", 'data.images=["/nowhere/*.tar"]'], r"/nowhere/\*\.tar"),
        (["--set", "train.init_from=/nowhere"], r"/nowhere is no checkpoint"),
        (["--set", "mllm.path=/nowhere/mllm"], r"no MLLM at /nowhere/mllm"),
        (["--set", "codec.path=/nowhere/vae"], r"no autoencoder at /nowhere/vae"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(world, tmp_path, capsys, change, message):
    config = small_config(world, tmp_path)
    assert main(["train", str(config_file(config, tmp_path / "config.py")), *change]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iomm: error: ")
    assert re.search(message, line), line
    assert not config.run_dir.exists()


def test_a_layout_that_does_not_fit_the_ranks_is_one_line_without_a_traceback(world, tmp_path):
    config = small_config(world, tmp_path)
    done = iomm("train", config_file(config, tmp_path / "config.py"), "--set", "parallel.tp=2")
    assert done.returncode == 1
    assert done.stderr.startswith("iomm: error: world size 1 is not divisible by tp*pp = 2*1 = 2.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["sample", "--prompt", "x"], ["reconstruct", "x.png"], ["report"]])
def test_commands_on_what_is_no_run_say_so(tmp_path, capsys, command):
    name, *rest = command
    assert main([name, str(tmp_path), *rest]) == 1
    said = capsys.readouterr().err
    assert said.startswith("iomm: error: ") and str(tmp_path) in said and said.count("\n") == 1


def test_a_config_file_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("x = 1\n")
    for name, message in (("empty.py", "has no function config()"), ("none.py", "no configuration at")):
        assert main(["train", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden_behind_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("iomm.cli.load_config", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(tmp_path)])


def test_a_rank_that_failed_among_others_ends_at_once_with_its_traceback(monkeypatch, tmp_path, capsys):
    left: list[int] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("iomm.cli._leave", left.append)
    monkeypatch.setattr("iomm.cli.load_config", lambda path: 1 / 0)
    main(["train", str(tmp_path)])
    assert left == [1] and "ZeroDivisionError" in capsys.readouterr().err


def test_doctor_names_the_backends():
    done = iomm("doctor")
    assert done.returncode == 0
    assert "local" in done.stdout and "triton" in done.stdout


def test_bench_mask_reports_all_modes_and_how_many_positions_drop_runs():
    sizes = ("--width", 64, "--layers", 1, "--batch", 1, "--repeats", 1)
    done = iomm("bench", "mask", "--mask-ratio", 0.85, *sizes)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["time_ms"].keys() == record["peak_mib"].keys() == {"zero", "hide", "drop"}
    assert record["prefix"]["hide"] == 268 and 12 < record["prefix"]["drop"] < 90


def test_bench_prefix_reports_both_passes_in_one_run():
    done = iomm("bench", "prefix", "--width", 64, "--layers", 1, "--batch", 1, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["time_ms"].keys() == record["peak_mib"].keys() == {"naive", "split"}
    assert record["prefix"] == 268 and record["queries"] == 256
