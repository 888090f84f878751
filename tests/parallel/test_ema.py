"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from iomm.parallel.ema import Ema


def _linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=dtype)


def _masters(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def test_the_average_follows_its_definition() -> None:
    module = _linear(torch.float64)
    ema = Ema(module, _masters(module), 0.9)
    expected = module.weight.detach().clone()
    for step in range(5):
        module.weight.data.add_(step)
        ema.update()
        expected = 0.9 * expected + 0.1 * module.weight.detach()
    torch.testing.assert_close(ema.weights["weight"], expected)
    assert not ema.weights["weight"].requires_grad


def test_swapped_in_weights_are_the_average_and_the_own_ones_come_back() -> None:
    module = _linear()
    ema = Ema(module, _masters(module), 0.5)
    module.weight.data.add_(1.0)
    own, storage = module.weight.detach().clone(), module.weight.data_ptr()
    with ema.swapped_in():
        assert torch.equal(module.weight, ema.weights["weight"])
    assert torch.equal(module.weight, own) and module.weight.data_ptr() == storage


def test_the_own_weights_come_back_after_an_error() -> None:
    module = _linear()
    ema = Ema(module, _masters(module), 0.5)
    module.weight.data.add_(1.0)
    own = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        raise RuntimeError("inside")
    assert torch.equal(module.weight, own)


def test_a_bf16_module_is_averaged_in_fp32_over_its_masters() -> None:
    module = _linear(torch.bfloat16)
    masters = {name: p.detach().float() for name, p in module.named_parameters()}
    ema = Ema(module, masters, 0.999)
    masters["weight"].add_(1e-4)  # far below bf16's resolution
    before = ema.weights["weight"].clone()
    ema.update()
    assert ema.weights["weight"].dtype == torch.float32
    assert not torch.equal(ema.weights["weight"], before)
    with ema.swapped_in():
        assert module.weight.dtype == torch.bfloat16


def test_frozen_weights_are_neither_averaged_nor_swapped() -> None:
    module = _linear()
    module.bias.requires_grad_(False)
    ema = Ema(module, {"weight": module.weight}, 0.5)
    assert set(ema.weights) == {"weight"}
    module.bias.data.add_(1.0)
    own = module.bias.detach().clone()
    with ema.swapped_in():
        assert torch.equal(module.bias, own)
