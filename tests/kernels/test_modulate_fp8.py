"""modulate_fp8's cast and scale, in PyTorch: Triton's interpreter does not cast to FP8."""

import pytest
import torch

from iomm_kernels.modulate import modulate
from iomm_kernels.modulate_fp8 import modulate_fp8

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, 40, generator=GENERATOR)
SHIFT, SCALE = torch.randn(2, 3, 40, generator=GENERATOR)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3)])
def test_dequantised_numbers_are_within_half_a_step_and_amax_is_the_largest(
    dtype: torch.dtype, steps: float
) -> None:
    y = modulate(X, SHIFT, SCALE, provider="eager")
    quant_scale = torch.finfo(dtype).max / y.abs().max()
    q, amax = modulate_fp8(X, SHIFT, SCALE, quant_scale, out_dtype=dtype, provider="eager")
    assert q.dtype == dtype
    assert amax == y.abs().max()
    smallest = torch.finfo(dtype).tiny / quant_scale
    torch.testing.assert_close(q.float() / quant_scale, y, rtol=steps, atol=(steps * smallest).item())


def test_numbers_beyond_the_largest_are_clamped_and_amax_still_tells() -> None:
    q, amax = modulate_fp8(X, SHIFT, SCALE, torch.tensor(1e4), provider="eager")
    assert q.float().abs().max() == 448
    assert amax == modulate(X, SHIFT, SCALE, provider="eager").abs().max()


def test_a_gradient_a_vector_of_scales_and_an_unknown_dtype_are_refused() -> None:
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="no backward pass.*Use modulate"):
        modulate_fp8(X.clone().requires_grad_(), SHIFT, SCALE, one)
    with pytest.raises(ValueError, match="quant_scale has 2 numbers; give one"):
        modulate_fp8(X, SHIFT, SCALE, torch.ones(2))
    with pytest.raises(ValueError, match="out_dtype torch.int8 is none of"):
        modulate_fp8(X, SHIFT, SCALE, one, out_dtype=torch.int8)
