"""Two real ranks hold, byte for byte, what the planner says."""

from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [pytest.mark.multi, pytest.mark.slow]


# Tensor and pipeline parallelism split weights: test_weights.py compares those rank by rank.
# What needs real ranks is the optimizer's state, spread over data-parallel ones.
def test_two_data_parallel_ranks_hold_the_planned_bytes(torchrun: Callable[..., str]) -> None:
    torchrun(HERE / "ranks_bytes.py", "1", "1", timeout_s=240)
