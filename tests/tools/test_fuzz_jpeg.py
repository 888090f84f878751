"""tools/fuzz_jpeg.py: a slice of what it runs, and that it tells when something is found."""

from pathlib import Path

import pytest

from iomm_kernels import build
from tools import fuzz_jpeg


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if problem := build.JPEG.problem():
        pytest.skip(f"the JPEG decoder {problem}")
    try:
        return fuzz_jpeg.build_driver(tmp_path_factory.mktemp("fuzz"))
    except RuntimeError as error:
        pytest.skip(f"this compiler has no sanitizers: {str(error).splitlines()[-1]}")


def test_damaged_jpegs_are_decoded_or_refused_and_the_sanitizers_find_nothing(driver: Path) -> None:
    outcome = fuzz_jpeg.run(driver, 400, seed=1)
    assert outcome.problem == ""
    assert outcome.answers["decoded"] >= 100
    assert outcome.answers["refused: Premature end of JPEG file"] >= 5


def test_a_decoder_that_ends_before_all_inputs_are_answered_is_a_finding(tmp_path: Path) -> None:
    crashing = tmp_path / "crashing"
    crashing.write_text("#!/bin/sh\necho decoded\necho heap-buffer-overflow >&2\ncat > /dev/null\nexit 1\n")
    crashing.chmod(0o755)
    outcome = fuzz_jpeg.run(crashing, 3, seed=0)
    assert outcome.problem == "input 1 of seed 0 ended the decoder, status 1:\nheap-buffer-overflow\n"
