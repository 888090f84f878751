"""Exponential moving average of the weights: e <- decay * e + (1 - decay) * w after every step that changed
them.

The average is sharded like the optimizer: a rank keeps that of the parts it steps.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from iomm.parallel.masters import Piece
from iomm_kernels.ema_update import ema_update


@final
class Ema:
    """The average of the trainable weights, in fp32 (fp64 where a weight is fp64).

    Args:
        owned: the parts of weights that this rank steps, and so averages.
        decay: in [0, 1).
        gather: completes the weights of all ranks after each has written its parts; all ranks call.

    Raises:
        ValueError: `decay` outside [0, 1).
    """

    def __init__(self, owned: Sequence[Piece], decay: float, gather: Callable[[], None]) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"optimizer.ema_decay {decay} must lie in [0, 1). Set it to null for no EMA.")
        self.decay = decay
        self._owned = owned
        self._gather = gather
        self.weights: dict[str, Tensor] = {}  # by the weight's name: this rank's part, flat
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the present weights."""
        self.weights = {
            p.name: p.master.detach()
            .view(-1)
            .to(torch.promote_types(p.master.dtype, torch.float32), copy=True)
            for p in self._owned
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        weights = [p.master.detach().view(-1) for p in self._owned]
        ema_update(list(self.weights.values()), weights, self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the layers compute with the average; all ranks enter and leave it together, and no
        optimizer step may happen there. Afterwards the weights are what they were, bit for bit."""
        own = [p.of_weight().clone() for p in self._owned]
        try:
            self._write([self.weights[p.name] for p in self._owned])
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for piece, value in zip(self._owned, values, strict=True):
            piece.of_weight().copy_(value)
        self._gather()
