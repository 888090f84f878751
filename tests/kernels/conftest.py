"""The compiled operators: those that `make kernels` built, or ones built here for the session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from iomm_kernels import build, csrc


@pytest.fixture(scope="session")
def compiled_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the loaded CPU library. Skips where it cannot be built; an operator already in the process
    stays there, so the library is loaded once a session."""
    record = build.HERE / f"{build.CPU.file}.digest"
    if record.exists() and record.read_text() == build.CPU.digest():
        assert csrc.load_problem("cpu") is None, csrc.load_problem("cpu")
        yield build.HERE
        return
    if problem := build.CPU.problem():
        pytest.skip(f"the compiled CPU operators cannot be built: the library {problem}")
    folder = tmp_path_factory.mktemp("csrc")
    build.build(build.CPU, folder)
    before = os.environ.get("IOMM_CSRC_DIR")
    os.environ["IOMM_CSRC_DIR"] = str(folder)
    csrc.load_problem.cache_clear()
    assert csrc.load_problem("cpu") is None, csrc.load_problem("cpu")
    yield folder
    csrc.load_problem.cache_clear()
    del os.environ["IOMM_CSRC_DIR"]
    if before is not None:
        os.environ["IOMM_CSRC_DIR"] = before
