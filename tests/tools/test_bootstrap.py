"""tools/bootstrap.sh: which Python it picks, and what it says when there is none. Nothing is installed."""

import os
import stat
import subprocess
from pathlib import Path

BOOTSTRAP = Path(__file__).parents[2] / "tools" / "bootstrap.sh"


def fake_python(path: Path, version: str) -> Path:
    """An executable that answers the bootstrap's question like `version`; "" fails like a bare shim."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = f'echo "{version} {path}"' if version else 'echo "pyenv: command not found" >&2; exit 127'
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def find(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `bootstrap.sh --find` where PATH holds only tmp_path/bin and a few system tools, none a Python."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "env"):
        source = next(p for folder in ("/bin", "/usr/bin") if (p := Path(folder) / name).exists())
        if not (tools / name).exists():
            (tools / name).symlink_to(source)
    path = f"{tmp_path / 'bin'}{os.pathsep}{tools}"
    env = {"PATH": path, "HOME": str(tmp_path), "IOMM_PYTHON_ROOTS": "", **variables}
    return subprocess.run([str(BOOTSTRAP), "--find"], env=env, capture_output=True, text=True, check=False)


def test_a_new_python_on_the_path_is_found(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "bin" / "python3.13", "3.13.1")
    assert find(tmp_path).stdout.strip() == str(python)


def test_a_shim_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3.12", "")
    python = fake_python(tmp_path / "bin" / "python3", "3.14.0")
    assert find(tmp_path).stdout.strip() == str(python)


def test_an_old_python_on_the_path_gives_way_to_a_new_one_in_a_known_folder(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3", "3.11.2")
    python = fake_python(tmp_path / "versions" / "3.12.7" / "bin" / "python3", "3.12.7")
    assert find(tmp_path, IOMM_PYTHON_ROOTS=str(tmp_path / "versions")).stdout.strip() == str(python)


def test_only_old_pythons_are_refused_by_name_with_the_way_out(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "bin" / "python3", "3.11.2")
    result = find(tmp_path)
    assert result.returncode != 0
    assert result.stdout == ""
    assert "no Python >= 3.12" in result.stderr
    assert f"{python} (3.11.2)" in result.stderr
    assert "PYTHON=/path/to/python3.12" in result.stderr


def test_the_named_python_wins_over_the_one_on_the_path(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3.12", "3.12.1")
    named = fake_python(tmp_path / "mine" / "python", "3.13.0")
    assert find(tmp_path, PYTHON=str(named)).stdout.strip() == str(named)


def test_a_named_old_python_is_refused_with_its_version(tmp_path: Path) -> None:
    named = fake_python(tmp_path / "mine" / "python", "3.10.4")
    result = find(tmp_path, PYTHON=str(named))
    assert result.returncode != 0
    assert f"PYTHON={named} is Python 3.10.4, but iomm needs 3.12 or newer" in result.stderr


def test_a_named_python_that_does_not_run_is_refused(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3.12", "3.12.1")
    result = find(tmp_path, PYTHON=str(tmp_path / "nowhere"))
    assert result.returncode != 0
    assert "does not run" in result.stderr
