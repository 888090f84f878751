"""tools/convert_checkpoint.py and tools/measure_conversion.py, run by path as an operator does."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.random_run import save_random_run
from tests.small_run import small_config

TOOLS = Path(__file__).parents[2] / "tools"


def test_every_command_of_the_converter(world, tmp_path, capsys, mesh):
    convert = runpy.run_path(str(TOOLS / "convert_checkpoint.py"))["main"]
    run, folder, back = save_random_run(small_config(world, tmp_path)), tmp_path / "out", tmp_path / "back"
    assert convert(["to-hf", str(run), str(folder), "--raw"]) == 0
    assert convert(["from-hf", str(folder), str(back)]) == 0
    assert convert(["inspect", str(folder)]) == 0
    assert convert(["verify", str(folder), str(back), "--hashes-only"]) == 0
    assert "exported by iomm" in capsys.readouterr().out
    assert convert(["to-hf", str(run), str(folder)]) == 1
    assert convert(["verify", str(folder), str(tmp_path / "none")]) == 1
    assert "is no checkpoint and holds none" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_of_a_conversion_is_measured_and_nothing_is_left(tmp_path):
    command = [sys.executable, TOOLS / "measure_conversion.py", "--params", "1e5", "--folder", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "export: " in done.stdout
    assert "import: " in done.stdout
    assert list(tmp_path.iterdir()) == []
