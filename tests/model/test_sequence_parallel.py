"""Generators over tensor-parallel ranks, with and without sequence parallelism."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_split_generators_equal_whole_ones_and_split_sequences_are_kept_in_part(
    torchrun: Callable[..., str],
) -> None:
    printed = torchrun(Path(__file__).parent / "ranks_sequence.py", timeout_s=300)
    line = next(line for line in printed.splitlines() if line.startswith("SAVED "))
    saved = json.loads(line.removeprefix("SAVED "))
    for family in ("flux", "z_image"):
        # Between a column and a row the sequence is whole either way; block inputs are not.
        for mode, most in (("none", 0.8), ("selective", 0.92), ("full", 0.56)):
            assert saved[f"{family} sp {mode}"] < most * saved[f"{family} tp {mode}"], saved
