"""One run handed through pipeline, tensor and data parallel layouts equals a single process."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iomm.config import ParallelConfig
from iomm.parallel.mesh import Mesh

SCRIPT = Path(__file__).parent / "ranks_layouts.py"
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.1}
CASES = {
    2: [
        "adamw-fp64-whole",
        "adamw-fp32-sharded",
        "adamw-bf16-sharded",
        "muon-fp32-whole",
        "muon-bf16-sharded",
    ],
    4: ["adamw-fp64-whole", "adamw-fp32-sharded", "muon-bf16-sharded"],
}

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_handed_from_layout_to_layout_by_names_is_that_of_one_process(
    torchrun: Callable[..., str], mesh: Mesh, tmp_path: Path, ranks: int
) -> None:
    torchrun(SCRIPT, tmp_path / "out.pt", *CASES[ranks], ranks=ranks, timeout_s=300)
    script = runpy.run_path(str(SCRIPT))
    for case, theirs in torch.load(tmp_path / "out.pt").items():
        kind, precision, distributed = case.split("-")
        alone = script["engine"](kind, precision, distributed == "sharded", ParallelConfig(), mesh, seed=0)
        rel = TOLERANCE[precision]
        numbers = script["train"](alone, 0, len(theirs["numbers"]), mesh)
        for step, (mine, others) in enumerate(zip(numbers, theirs["numbers"], strict=True)):
            assert others == pytest.approx(mine, rel=rel), f"{case}, step {step}"
        wanted = script["whole_state"](alone, mesh)
        assert theirs["state"].keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(theirs["state"][key], value, rtol=rel, atol=rel, msg=f"{case} {key}")
