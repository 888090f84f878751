"""Several ranks over gloo: each test runs one script of this folder under torchrun."""

from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_layers_split_over_two_ranks_equal_whole_ones_in_value_and_gradient(
    torchrun: Callable[..., str],
) -> None:
    torchrun(HERE / "ranks_layers.py")
