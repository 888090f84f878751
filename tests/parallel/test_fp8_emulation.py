"""The arithmetic of emulated FP8, against torch's own 8-bit types and sums done by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iomm.config import Fp8Config
from iomm.parallel.fp8_emulation import (
    BLOCK,
    E4M3,
    E5M2,
    Blockwise,
    Current,
    Delayed,
    Emulation,
    Format,
    Operand,
    emulation,
    quantize,
    resized,
    scale_of,
)

TYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
ONE = torch.tensor(1.0)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def cast(x: Tensor, scale: Tensor, to: Format) -> Tensor:
    """Quantized by torch's own conversion."""
    y = (x * scale).clamp(-to.largest, to.largest)
    return y.to(TYPES[to]).float() * (1 / scale)


@pytest.mark.parametrize("to", [E4M3, E5M2])
def test_every_8_bit_number_is_kept(to: Format) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(TYPES[to]).float()
    finite = numbers[numbers.isfinite()]
    assert finite.abs().max() == to.largest
    torch.testing.assert_close(quantize(finite, ONE, to), finite, rtol=0, atol=0)


@pytest.mark.parametrize("to", [E4M3, E5M2])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), log_size=st.floats(-20, 20), log_scale=st.floats(-20, 20))
def test_rounding_equals_torchs_conversion_at_any_size(
    to: Format, seed: int, log_size: float, log_scale: float
) -> None:
    x, scale = drawn(64, seed=seed, scale=2.0**log_size), torch.tensor(2.0**log_scale)
    torch.testing.assert_close(quantize(x, scale, to), cast(x, scale, to), rtol=0, atol=0)


def test_halfway_numbers_go_to_the_even_one() -> None:
    x = torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10])  # spacing 2 at 16, 2^-9 below 2^-6
    torch.testing.assert_close(quantize(x, ONE, E4M3), torch.tensor([16.0, 20.0, 0.0, 2.0**-8]))


def test_beyond_the_range_is_its_end_and_nan_stays() -> None:
    x = torch.tensor([500.0, -1e30, float("inf"), float("nan")])
    out = quantize(x, ONE, E4M3)
    assert out[:3].tolist() == [448.0, -448.0, 448.0] and out[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_result_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    x = drawn(8).to(dtype)
    torch.testing.assert_close(quantize(x, ONE, E5M2), quantize(x.float(), ONE, E5M2).to(dtype))


def test_a_scale_puts_the_largest_value_at_the_end_of_the_range_and_is_1_for_zeros() -> None:
    assert scale_of(torch.tensor(7.0), E4M3) == 64
    assert scale_of(torch.tensor(7.0), E4M3, margin=2) == 16
    assert scale_of(torch.tensor(0.0), E4M3) == 1
    assert scale_of(torch.tensor(1e-40), E5M2).isfinite()


def _blocks_by_hand(x_MC: Tensor, rows: int, columns: int) -> Tensor:
    out = torch.empty_like(x_MC)
    for i in range(0, x_MC.shape[0], rows):
        for j in range(0, x_MC.shape[1], columns):
            block = x_MC[i : i + rows, j : j + columns]
            scale = torch.exp2(torch.log2(448 / block.abs().max()).floor())
            out[i : i + rows, j : j + columns] = cast(block, scale, E4M3)
    return out


@pytest.mark.parametrize("m, c", [(3, 256), (130, 20), (256, 128)])
def test_blocks_have_their_own_power_of_two(m: int, c: int) -> None:
    x_MC = drawn(m, c) * drawn(m, 1, seed=1).exp() * drawn(1, c, seed=2).exp()
    fp8 = Blockwise()
    by_rows = fp8.over_channels(x_MC, Operand.INPUT, record=True)
    torch.testing.assert_close(by_rows, _blocks_by_hand(x_MC, 1, BLOCK), rtol=0, atol=0)
    weight = fp8.over_channels(x_MC, Operand.WEIGHT, record=True)
    torch.testing.assert_close(weight, _blocks_by_hand(x_MC, BLOCK, BLOCK), rtol=0, atol=0)
    by_columns = fp8.over_tokens(x_MC, by_rows)
    torch.testing.assert_close(by_columns, _blocks_by_hand(x_MC, BLOCK, 1), rtol=0, atol=0)


def _products(fp8: Emulation, x: Tensor, weight_NK: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight_NK = x.clone().requires_grad_(), weight_NK.clone().requires_grad_()
    y = fp8(x, weight_NK)
    dx, dw = torch.autograd.grad(y, [x, weight_NK], dy)
    return y.detach(), dx, dw


def test_all_three_products_have_quantized_operands() -> None:
    x, weight_NK, dy = drawn(3, 5, 24), drawn(16, 24, seed=1), drawn(3, 5, 16, seed=2, scale=1e-6)
    x_q, weight_q = (cast(v, 448 / v.abs().max(), E4M3) for v in (x, weight_NK))
    dy_q = cast(dy, 57344 / dy.abs().max(), E5M2)
    y, dx, dw = _products(Current(frozenset(), None), x, weight_NK, dy)
    torch.testing.assert_close(y, x_q @ weight_q.T)
    torch.testing.assert_close(dx, dy_q @ weight_q)
    torch.testing.assert_close(dw, torch.einsum("lbn,lbk->nk", dy_q, x_q))


def test_blockwise_sums_over_tokens_with_blocks_along_the_tokens() -> None:
    x, weight_NK, dy = drawn(150, 24), drawn(16, 24, seed=1), drawn(150, 16, seed=2, scale=1e-6)
    _, dx, dw = _products(Blockwise(), x, weight_NK, dy)
    rows, weight_q = _blocks_by_hand(dy, 1, BLOCK), _blocks_by_hand(weight_NK, BLOCK, BLOCK)
    torch.testing.assert_close(dx, rows @ weight_q)
    torch.testing.assert_close(dw, _blocks_by_hand(dy, BLOCK, 1).T @ _blocks_by_hand(x, BLOCK, 1))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_operand_gets_no_gradient(frozen: str) -> None:
    x, weight_NK = drawn(4, 8), drawn(6, 8, seed=1)
    kept = weight_NK if frozen == "x" else x
    kept.requires_grad_()
    Current(frozenset(), None)(x, weight_NK).sum().backward()
    assert kept.grad is not None and (weight_NK if frozen == "weight" else x).grad is None


def _step(fp8: Delayed, x: Tensor, weight_NK: Tensor, dy: Tensor) -> Tensor:
    y, *_ = _products(fp8, x, weight_NK, dy)
    fp8.push(fp8.amax_history_H3[0].clone())
    return y


def test_a_delayed_scale_is_that_of_the_largest_value_of_earlier_steps() -> None:
    fp8 = Delayed(3, margin=1)
    x, weight_NK, dy = drawn(4, 8), drawn(6, 8, seed=1), drawn(4, 6, seed=2)
    first = _step(fp8, x, weight_NK, dy)  # without a history: scale 1
    torch.testing.assert_close(first, cast(x, ONE, E4M3) @ cast(weight_NK, ONE, E4M3).T)
    expected = (
        torch.tensor([448.0, 448, 57344]) / 2 / torch.stack([v.abs().max() for v in (x, weight_NK, dy)])
    )
    torch.testing.assert_close(fp8.scale_3, expected)
    second = _step(fp8, 0.1 * x, weight_NK, dy)  # smaller values leave the scale
    scales = fp8.scale_3.clone()
    torch.testing.assert_close(scales, expected)
    torch.testing.assert_close(
        second, cast(0.1 * x, expected[0], E4M3) @ cast(weight_NK, expected[1], E4M3).T
    )
    _step(fp8, 0.1 * x, weight_NK, dy)
    torch.testing.assert_close(fp8.scale_3, scales)
    _step(fp8, 0.1 * x, weight_NK, dy)  # the fourth of 3 steps: the first is forgotten
    torch.testing.assert_close(fp8.scale_3[0], 10 * scales[0])


def test_values_outgrowing_their_history_saturate() -> None:
    fp8 = Delayed(4, margin=0)
    weight_NK, dy = torch.eye(8), torch.ones(4, 8)
    _step(fp8, torch.ones(4, 8), weight_NK, dy)
    torch.testing.assert_close(_step(fp8, 9 * torch.ones(4, 8), weight_NK, dy), torch.ones(4, 8))


def test_a_step_collects_the_largest_of_its_micro_batches_and_nothing_of_evaluation() -> None:
    fp8, weight_NK = Delayed(4, margin=0), drawn(6, 8)
    for size in (1.0, 5.0, 2.0):
        fp8(torch.full((4, 8), size, requires_grad=True), weight_NK).sum().backward()
    with torch.no_grad():
        fp8(torch.full((4, 8), 99.0), weight_NK)
    assert fp8.amax_history_H3[0].tolist() == [5.0, float(weight_NK.abs().max()), 1.0]


def test_a_value_that_is_not_finite_is_forgotten() -> None:
    fp8 = Delayed(4, margin=0)
    fp8.push(torch.tensor([1.0, float("inf"), float("nan")]))
    assert fp8.scale_3.tolist() == [448.0, 1.0, 1.0]
    assert fp8.amax_history_H3.isfinite().all()


def test_a_history_of_another_length_keeps_its_newest_steps() -> None:
    history = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert resized(history, 3).flatten().tolist() == [0.0, 2.0, 3.0]
    assert resized(history, 6).flatten().tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 3.0]
    assert resized(history, 4).equal(history)
    assert resized(history, 1).tolist() == [[0.0]]


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise"])
def test_fp64_agrees_with_fp32(recipe: str) -> None:
    wide, narrow = (emulation(Fp8Config(recipe=recipe), frozenset(), None) for _ in range(2))  # type: ignore[arg-type]
    x, weight_NK, dy = drawn(4, 8), drawn(6, 8, seed=1), drawn(4, 6, seed=2)
    expected = _products(narrow, x, weight_NK, dy)
    for ours, theirs in zip(
        _products(wide, x.double(), weight_NK.double(), dy.double()), expected, strict=True
    ):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours.float(), theirs)
