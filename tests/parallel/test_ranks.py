"""Several ranks over gloo: each test runs one script of this folder under torchrun."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iomm.checkpoint.sharded import latest, load_weights
from iomm.parallel.mesh import Mesh

HERE = Path(__file__).parent

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_layers_split_over_two_ranks_equal_whole_ones_in_value_and_gradient(
    torchrun: Callable[..., str],
) -> None:
    torchrun(HERE / "ranks_layers.py")


def test_emulated_fp8_split_over_two_ranks_equals_that_of_whole_layers(torchrun: Callable[..., str]) -> None:
    torchrun(HERE / "ranks_fp8.py")


def test_two_data_parallel_ranks_equal_one_and_resume_bit_for_bit(
    torchrun: Callable[..., str], mesh: Mesh, tmp_path: Path
) -> None:
    printed = torchrun(HERE / "ranks_engine.py", tmp_path)
    line = next(line for line in printed.splitlines() if line.startswith("LOSSES "))
    script = runpy.run_path(str(HERE / "ranks_engine.py"))
    for name, losses in json.loads(line.removeprefix("LOSSES ")).items():
        precision, distributed = name.split()
        config = script["settings"](precision, distributed == "True")
        alone = script["engine"](config, mesh)
        tolerance = 1e-6 if precision == "fp32" else 1e-7  # Megatron's gradient norm is fp32
        for mine, theirs in zip(script["train"](alone, config, mesh, 0, 4), losses, strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance)
        _check_weights_saved_by_two_ranks_open_on_one(
            script, config, mesh, tmp_path / f"{precision}_{distributed}"
        )


def _check_weights_saved_by_two_ranks_open_on_one(
    script: dict, config: object, mesh: Mesh, folder: Path
) -> None:  # type: ignore[type-arg]
    alone, opened = (script["engine"](config, mesh, seed) for seed in (0, 1))
    script["train"](alone, config, mesh, 0, 2)
    path = latest(folder)
    assert path is not None
    load_weights(path, opened.module, ema=False, mesh=mesh)
    for mine, theirs in zip(alone.module.parameters(), opened.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
