"""Exponential moving average of the weights: e <- decay * e + (1 - decay) * w after every step that changed
them."""

import contextlib
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn


@final
class Ema:
    """The average of the trainable weights of `module`, in fp32 (fp64 where a weight is fp64).

    Args:
        module: whose weights are averaged; frozen ones are left out.
        masters: the full-precision weights behind those of the module, by the same names.
        decay: in [0, 1).

    Raises:
        ValueError: `decay` outside [0, 1).
    """

    def __init__(self, module: nn.Module, masters: dict[str, Tensor], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"optimizer.ema_decay {decay} must lie in [0, 1). Set it to null for no EMA.")
        self.decay = decay
        self._module = module
        self._masters = masters
        self.weights: dict[str, Tensor] = {}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the present weights."""
        self.weights = {
            name: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True)
            for name, w in self._masters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        torch.ops.aten._foreach_lerp_.Scalar(
            list(self.weights.values()), [w.detach() for w in self._masters.values()], 1.0 - self.decay
        )

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the module computes with the average; no optimizer step may happen there."""
        own = {name: p.data for name, p in self._module.named_parameters() if name in self.weights}
        try:
            for name, parameter in self._module.named_parameters():
                if name in self.weights:
                    parameter.data = self.weights[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._module.named_parameters():
                if name in own:
                    parameter.data = own[name]
