"""The EMA of many weights: the eager path and what is refused. The kernel needs a GPU."""

import pytest
import torch

from iomm_kernels.ema_update import ema_update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_averages_move_by_one_minus_decay_towards_the_weights_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in ((3, 5), (7,), ())]
    averages = [torch.randn(w.shape) for w in weights]
    expected = [0.9 * e.double() + 0.1 * w.double() for e, w in zip(averages, weights, strict=True)]
    ema_update(averages, weights, 0.9)
    for average, exact in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), exact, rtol=1e-6, atol=1e-6)


def test_nothing_to_average_is_no_error() -> None:
    ema_update([], [], 0.9)


def test_what_does_not_fit_is_refused_with_what_was_given() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"decay 1.0 is outside \[0, 1\)"):
        ema_update([x], [x], 1.0)
    with pytest.raises(ValueError, match=r"2 averages and 1 weights"):
        ema_update([x, x], [x], 0.9)
    with pytest.raises(ValueError, match=r"\(\(3,\), \(2,\)\).*average a weight of its shape"):
        ema_update([x], [x[:2]], 0.9)
    with pytest.raises(ValueError, match="provider 'triton' is none of auto, eager, csrc"):
        ema_update([x], [x], 0.9, provider="triton")


def test_the_kernel_asked_for_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="'csrc' was asked for, but it .*Use 'eager' or 'auto'"):
        ema_update([torch.zeros(3)], [torch.zeros(3)], 0.9, provider="csrc")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_the_numbers_of_plain_pytorch(dtype: torch.dtype) -> None:
    sizes = [0, 1, 7, 8, 16_384, 16_385, 100_000, *([64] * 100), 6_000_000]  # splits in tensors and in blocks
    weights = [torch.randn(n, device="cuda").to(dtype) for n in sizes]
    averages = [torch.randn(n, device="cuda") for n in sizes]
    copies = [e.clone() for e in averages]
    ema_update(averages, weights, 0.999, provider="csrc")
    ema_update(copies, weights, 0.999, provider="eager")
    for average, copy in zip(averages, copies, strict=True):
        torch.testing.assert_close(average, copy, rtol=1e-6, atol=1e-7)
