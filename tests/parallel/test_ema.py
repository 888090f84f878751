"""The moving average of the weights."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from iomm.parallel.ema import Ema
from iomm.parallel.masters import Piece


def _linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=dtype)


def _whole(module: nn.Module, master: Callable[[torch.Tensor], torch.Tensor] = lambda p: p) -> list[Piece]:
    """One rank steps everything."""
    weights = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [Piece(name, p, 0, p.numel(), master(p.detach()), {}, 1) for name, p in weights]


def _ema(module: nn.Module, decay: float) -> Ema:
    return Ema(_whole(module), decay, gather=lambda: None)


def test_the_average_follows_its_definition() -> None:
    module = _linear(torch.float64)
    ema = _ema(module, 0.9)
    expected = module.weight.detach().clone()
    for step in range(5):
        module.weight.data.add_(step)
        ema.update()
        expected = 0.9 * expected + 0.1 * module.weight.detach()
    torch.testing.assert_close(ema.weights["weight"], expected.view(-1))
    assert not ema.weights["weight"].requires_grad


def test_swapped_in_weights_are_the_average_and_the_own_ones_come_back() -> None:
    module = _linear()
    ema = _ema(module, 0.5)
    module.weight.data.add_(1.0)
    own, storage = module.weight.detach().clone(), module.weight.data_ptr()
    with ema.swapped_in():
        assert torch.equal(module.weight.view(-1), ema.weights["weight"])
        assert not torch.equal(module.weight, own)
    assert torch.equal(module.weight, own) and module.weight.data_ptr() == storage


def test_the_own_weights_come_back_after_an_error() -> None:
    module = _linear()
    ema = _ema(module, 0.5)
    module.weight.data.add_(1.0)
    own = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        raise RuntimeError("inside")
    assert torch.equal(module.weight, own)


def test_a_bf16_module_is_averaged_in_fp32_over_its_masters() -> None:
    module = _linear(torch.bfloat16)
    owned = _whole(module, torch.Tensor.float)
    ema = Ema(owned, 0.999, gather=lambda: None)
    owned[0].master.add_(1e-4)  # far below bf16's resolution
    before = ema.weights["weight"].clone()
    ema.update()
    assert ema.weights["weight"].dtype == torch.float32
    assert not torch.equal(ema.weights["weight"], before)
    with ema.swapped_in():
        assert module.weight.dtype == torch.bfloat16


def test_frozen_weights_are_neither_averaged_nor_swapped() -> None:
    module = _linear()
    module.bias.requires_grad_(False)
    ema = _ema(module, 0.5)
    assert set(ema.weights) == {"weight"}
    module.bias.data.add_(1.0)
    own = module.bias.detach().clone()
    with ema.swapped_in():
        assert torch.equal(module.bias, own)


def test_a_rank_writes_the_average_of_its_part_alone_and_asks_the_others_for_theirs() -> None:
    module = _linear()
    weight, asked = module.weight, []
    piece = Piece("weight", weight, 2, 5, weight.detach().view(-1)[2:5], {}, 1)
    ema = Ema([piece], 0.5, gather=lambda: asked.append(weight.detach().clone()))
    own = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    with ema.swapped_in():
        assert torch.equal(weight.view(-1)[2:5], own.view(-1)[2:5])
        assert torch.equal(weight.view(-1)[:2], own.view(-1)[:2] + 1)
    assert torch.equal(weight, own + 1) and len(asked) == 2


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_no_average_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\). Set it to null"):
        _ema(_linear(), decay)
