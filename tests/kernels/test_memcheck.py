"""The memory checker finds what it is there for."""

import os
import subprocess
import sys
from pathlib import Path


def test_bounds_gaps_races_and_float_atomics_are_found_and_bytes_are_counted() -> None:
    script = Path(__file__).parent / "faulty_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["clean"] == "no fault"
    assert "copy, program (2, 0, 0): load outside of every tensor argument, 4 lanes" in said["beyond"]
    assert "store between or beyond the elements, at flat index y[3]" in said["gap"]
    assert "last, program (1, 0, 0): store in y where program 0 stores too: a race" in said["race"]
    assert "load in y where program 0 stores too: a race" in said["read"]
    assert "the order of the sum is not fixed" in said["atomic"]
    assert said["bytes"] == "28 28 1"  # 7 fp32 numbers each way
    assert said["reversed"] == "0"
