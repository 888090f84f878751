"""The CPU's Adam: torch's numbers, apex's contract."""

import pytest
import torch
from torch import Tensor

from iomm.parallel.adam import Adam


def _weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, dtype=dtype, generator=generator)) for n in (5, 1, 33)]


def _grads(weights: list[torch.nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_takes_the_steps_of_torch(dtype: torch.dtype, decoupled: bool) -> None:
    ours, theirs = _weights(dtype), _weights(dtype)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adam = Adam(ours, **settings, adam_w_mode=decoupled)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    for step in range(4):
        for w, v, g in zip(ours, theirs, _grads(ours, step), strict=True):
            w.grad, v.grad = g.clone(), g.clone()
        adam.step()
        reference.step()
    for w, v in zip(ours, theirs, strict=True):
        torch.testing.assert_close(w, v)


def test_adam_keeps_two_moments_a_weight_and_the_step_in_the_group() -> None:
    weights = _weights(torch.float32)
    adam = Adam(weights)
    for w, g in zip(weights, _grads(weights, 0), strict=True):
        w.grad = g
    adam.step()
    assert all(set(adam.state[w]) == {"exp_avg", "exp_avg_sq"} for w in weights)
    assert adam.param_groups[0]["step"] == 1


def test_adam_skips_a_weight_without_gradient() -> None:
    weights = _weights(torch.float32)
    before = [w.detach().clone() for w in weights]
    adam = Adam(weights)
    weights[0].grad = torch.ones_like(weights[0])
    adam.step()
    assert not torch.equal(weights[0], before[0])
    assert all(torch.equal(w, b) for w, b in zip(weights[1:], before[1:], strict=True))


def test_adam_refuses_to_run_without_bias_correction() -> None:
    with pytest.raises(ValueError, match="bias_correction=True only"):
        Adam(_weights(torch.float32), bias_correction=False)
