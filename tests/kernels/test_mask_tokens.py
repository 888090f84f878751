import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iomm.conditioning import mask
from iomm.random import Stream
from iomm_kernels.mask_tokens import MASK_STREAM, keep_tokens, mask_tokens
from iomm_kernels.philox import signed_seed, threshold, words

INDEX_B = torch.tensor([0, 5, (1 << 40) + 3])


def test_the_mask_is_the_one_the_trainer_draws() -> None:
    assert MASK_STREAM == Stream.MASK
    for ratio in (0.0, 0.45, 0.85, 1.0):
        kept = mask.keep_tokens(11, INDEX_B, 256, ratio)
        for provider in ("auto", "eager"):
            assert torch.equal(keep_tokens(INDEX_B, 256, 11, ratio, provider=provider), kept)


def test_masked_tokens_are_zero_and_kept_ones_unchanged() -> None:
    x_BNF = torch.randn(3, 256, 8)
    kept = mask.keep_tokens(11, INDEX_B, 256, 0.85)
    for provider in ("auto", "eager"):
        assert torch.equal(mask_tokens(x_BNF, INDEX_B, 11, 0.85, provider=provider), x_BNF * kept[..., None])


def test_a_masked_token_that_is_not_finite_becomes_zero() -> None:
    x_BNF = torch.full((1, 8, 4), torch.nan)
    for provider in ("auto", "eager"):
        assert torch.equal(
            mask_tokens(x_BNF, INDEX_B[:1], 0, 1.0, provider=provider), torch.zeros_like(x_BNF)
        )


def test_null_samples_keep_nothing() -> None:
    hidden_B = torch.tensor([False, True, False])
    kept = keep_tokens(INDEX_B, 64, 0, 0.2, hidden_B)
    assert not kept[1].any()
    assert torch.equal(kept[::2], keep_tokens(INDEX_B[::2], 64, 0, 0.2))


@given(st.floats(0.0, 1.0))
def test_comparing_integers_decides_as_comparing_uniform_numbers(ratio: float) -> None:
    level = threshold(ratio)
    high = torch.tensor([h for h in (0, level - 1, level, (1 << 23) - 1) if 0 <= h < 1 << 23])
    uniform = (high.to(torch.float32) + 0.5) * 2.0**-23
    assert torch.equal(high >= level, uniform >= ratio)


@given(st.integers(0, (1 << 64) - 1))
def test_a_seed_as_a_signed_number_draws_the_same_bits(seed: int) -> None:
    assert -(1 << 63) <= signed_seed(seed) < 1 << 63
    assert torch.equal(words(signed_seed(seed), 3, INDEX_B, 5), words(seed, 3, INDEX_B, 5))


def test_a_ratio_outside_its_range_is_refused() -> None:
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"mask ratio .* is outside \[0, 1\]"):
            keep_tokens(INDEX_B, 4, 0, ratio)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give x \(B, N, F\) and index \(B,\)"):
        mask_tokens(torch.zeros(2, 4, 8), INDEX_B, 0, 0.5)
    with pytest.raises(ValueError, match=r"give bool \(3,\)"):
        keep_tokens(INDEX_B, 4, 0, 0.5, torch.zeros(2, dtype=torch.bool))


@pytest.mark.slow
def test_kernels_behind_no_record_agree_with_eager() -> None:
    script = Path(__file__).parent / "interpret_masked.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
