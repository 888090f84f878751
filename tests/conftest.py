"""What holds for every test: one thread, no network, and tests that say why they are skipped."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: tests may count on two cores only, and one thread sums reproducibly.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch finds no CUDA device, `browser` where the page cannot be opened."""
    if missing := _missing_for_the_page():
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=f"no {' and no '.join(missing)} on this machine"))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def _missing_for_the_page() -> list[str]:
    missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    chromium = any(map(shutil.which, ("chromium", "chromium-browser")))
    return missing if chromium else [*missing, "chromium"]


@pytest.fixture(scope="session")
def mesh() -> Any:
    """The mesh of one process, shared by all tests of the session (starting Megatron-Core takes seconds)."""
    from iomm.config import ParallelConfig
    from iomm.parallel import mesh

    return mesh.start(ParallelConfig())


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a script on several ranks over loopback. Returns what it printed, and fails with that unless it was
    to end as it did."""

    def run(script: Path, *args: object, ranks: int = 2, timeout_s: int = 90, fails: bool = False) -> str:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        root = Path(__file__).parent.parent
        path = os.pathsep.join((str(root), str(root / "kernels")))
        process = subprocess.Popen(
            [*launch, str(script), *map(str, args)],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
            cwd=tmp_path_factory.mktemp("ranks"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:  # timed out: torchrun, asked to end, ends its ranks
                process.terminate()
                process.communicate()
        assert (process.returncode != 0) == fails, printed[-6000:]
        return printed

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory):
    """Frozen models and shards of `tests.small_run`, shared by all tests; nobody writes into it."""
    from tests.small_run import build_world

    return build_world(tmp_path_factory.mktemp("world"))
