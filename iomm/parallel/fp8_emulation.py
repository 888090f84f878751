"""Matrix products in 8 bits, emulated in plain torch: quantize, dequantize, multiply as before.

What a GPU with Transformer Engine computes in FP8, to see on any device what the numerics cost. Nothing gets
faster or smaller. Three products of a linear y = x W^T with output gradient dy have quantized operands:

    y = Q(x) Q(W)^T        dx = Q(dy) Q(W)        dW = Q(dy)^T Q(x)

The recipes are Transformer Engine's of the same name; E4M3 reaches 448, E5M2 57,344:

    delayed    one scale a tensor, from the largest absolute value (amax) of earlier steps; E4M3, dy in E5M2
    current    one scale a tensor, from its own amax; E4M3, dy in E5M2
    blockwise  a power of two for every 1 x 128 of x and dy and 128 x 128 of W; E4M3. dW sums over tokens, so
               its operands have their blocks along the tokens (arXiv 2412.19437 section 3.3)

A layout changes no number: an amax is the whole tensor's, over tensor-parallel ranks where these hold parts
of it, and a delayed scale changes once a step (`Delayed.push`), by the largest amax of the step's
micro-batches and data-parallel ranks. (Transformer Engine itself reduces less, and moves its scales at every
micro-batch.) Blocks follow the whole tensor where a rank's part is a multiple of 128 wide.

M tokens (all leading axes), N outputs, K inputs, H steps of history.
"""

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import Fp8Config

BLOCK = 128


class Format(NamedTuple):
    """An 8-bit floating-point format."""

    mantissa_bits: int
    min_exponent: int  # of the smallest normal number; below it the spacing stays the same
    largest: float


E4M3 = Format(3, -6, 448.0)
E5M2 = Format(2, -14, 57344.0)


class Operand(IntEnum):
    """What is quantized; also the column of a linear's amax history."""

    INPUT = 0
    WEIGHT = 1
    GRADIENT = 2  # of the output


def quantize(x: Tensor, scale: Tensor, to: Format) -> Tensor:
    """The numbers nearest to `x` that the format holds at this scale; ties to even, beyond the range its end.

    Args:
        x: any shape, floating point; NaN stays NaN.
        scale: fp32, positive, broadcasts to `x`: format's number = x * scale.
    Returns:
        dequantized, in the shape and dtype of `x`; computed in fp32.
    """
    y = (x.float() * scale).clamp_(-to.largest, to.largest)
    # Adding 1.5 * 2^k makes fp32 round at the format's last mantissa bit; k follows from y's own exponent.
    shift = 23 - to.mantissa_bits
    exponent = (y.view(torch.int32) & 0x7F80_0000).add_(shift << 23)
    rounder = (exponent.clamp_min_((127 + to.min_exponent + shift) << 23) | 0x0040_0000).view(torch.float32)
    return y.add_(rounder).sub_(rounder).mul_(1 / scale).to(x.dtype)


def scale_of(amax: Tensor, to: Format, margin: int = 0) -> Tensor:
    """fp32 scale that puts `amax` at the end of the format's range, `margin` powers of two below; 1 for 0."""
    scale = (to.largest / 2**margin) / amax.float()
    return torch.where(amax > 0, scale.clamp_max(torch.finfo(torch.float32).max), 1.0)


class Emulation(nn.Module, ABC):
    """The product of one linear. It has no weights, and nothing of it is in a state dict."""

    def forward(self, x: Tensor, weight_NK: Tensor) -> Tensor:
        """(..., K) -> (..., N), both in their own dtype."""
        return _Product.apply(x, weight_NK, self, torch.is_grad_enabled())  # type: ignore[no-any-return]

    @abstractmethod
    def over_channels(self, x: Tensor, operand: Operand, *, record: bool) -> Tensor:
        """`x` as the products y and dx read it. `record`: a training pass, whose amax counts."""

    def over_tokens(self, x: Tensor, quantized: Tensor) -> Tensor:
        """`x` (..., C) as the product dW reads it; `quantized` is what `over_channels` made of it."""
        del x
        return quantized


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, fp8: Emulation, record: bool) -> Tensor:
        x_q = fp8.over_channels(x, Operand.INPUT, record=record)
        weight_q = fp8.over_channels(weight_NK, Operand.WEIGHT, record=record)
        ctx.fp8 = fp8
        ctx.save_for_backward(fp8.over_tokens(x, x_q) if ctx.needs_input_grad[1] else None, weight_q)
        return F.linear(x_q, weight_q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_q, weight_q = ctx.saved_tensors
        (dy,) = gradients
        dy_q = ctx.fp8.over_channels(dy, Operand.GRADIENT, record=True)
        dx = dy_q @ weight_q if ctx.needs_input_grad[0] else None
        if x_q is None:
            return dx, None, None, None
        dy_q = ctx.fp8.over_tokens(dy, dy_q)
        return dx, dy_q.flatten(0, -2).T @ x_q.flatten(0, -2), None, None


class _PerTensor(Emulation, ABC):
    """One scale a tensor.

    Args:
        split: operands of which a tensor-parallel rank holds a part.
        group: these ranks; None if there is one.
    """

    def __init__(self, split: frozenset[Operand], group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.split, self.group = split, group if group is not None and group.size() > 1 else None

    def amax(self, x: Tensor, operand: Operand) -> Tensor:
        """Largest absolute value of the whole tensor; fp32."""
        amax = x.detach().abs().amax().float()
        if self.group is not None and operand in self.split:
            dist.all_reduce(amax, dist.ReduceOp.MAX, self.group)
        return amax


def _format(operand: Operand) -> Format:
    return E5M2 if operand is Operand.GRADIENT else E4M3


@final
class Current(_PerTensor):
    """Scales from the tensors themselves."""

    def over_channels(self, x: Tensor, operand: Operand, *, record: bool) -> Tensor:
        del record
        return quantize(x, scale_of(self.amax(x, operand), _format(operand)), _format(operand))


@final
class Delayed(Emulation):
    """Scales from the amax of the last H steps; 1 before the first. Outliers of this step saturate.

    Like Transformer Engine's, row 0 of the history collects the running step, row 1 is the oldest, the last
    row the newest.
    """

    amax_history_H3: Tensor
    scale_3: Tensor

    def __init__(self, steps: int, margin: int) -> None:
        super().__init__()
        self.margin = margin
        self.register_buffer("amax_history_H3", torch.zeros(steps, 3), persistent=False)
        self.register_buffer("scale_3", torch.ones(3), persistent=False)

    def over_channels(self, x: Tensor, operand: Operand, *, record: bool) -> Tensor:
        if record:
            running = self.amax_history_H3[0, operand]
            running.copy_(torch.maximum(running, x.detach().abs().amax().float()))
        return quantize(x, self.scale_3[operand], _format(operand))

    def push(self, amax_3: Tensor) -> None:
        """End a step of which these are the largest values; zeros: of which nothing is known."""
        history = self.amax_history_H3
        history[0] = torch.nan_to_num(amax_3, nan=0.0, posinf=0.0)
        largest = history.amax(0)
        for operand in Operand:
            fresh = scale_of(largest[operand], _format(operand), self.margin)
            self.scale_3[operand] = torch.where(largest[operand] > 0, fresh, self.scale_3[operand])
        if len(history) > 1:
            history.copy_(history.roll(-1, 0))
        history[0] = 0

    def amax_state(self) -> dict[str, Tensor] | None:
        """`amax_history` (H, 3) and `scale` (3,); the columns are `Operand`'s."""
        return {"amax_history": self.amax_history_H3, "scale": self.scale_3}

    def load_amax_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `amax_state`; of a history of another length the newest steps are kept."""
        self.amax_history_H3.copy_(resized(state["amax_history"], len(self.amax_history_H3)))
        self.scale_3.copy_(state["scale"])


def resized(history_H3: Tensor, steps: int) -> Tensor:
    """(steps, ...): the newest steps of a history, or the history behind steps of which nothing is known."""
    kept = history_H3[1:][-(steps - 1) :] if steps > 1 else history_H3[:0]
    return torch.cat((history_H3.new_zeros(steps - len(kept), *history_H3.shape[1:]), kept))


@final
class Blockwise(Emulation):
    """Scales of powers of two, as Transformer Engine's: the largest that keeps the block within the range."""

    def over_channels(self, x: Tensor, operand: Operand, *, record: bool) -> Tensor:
        del record
        if operand is Operand.WEIGHT:
            return _by_blocks(x, BLOCK, BLOCK)
        return _by_blocks(x.flatten(0, -2), 1, BLOCK).view_as(x)

    def over_tokens(self, x: Tensor, quantized: Tensor) -> Tensor:
        del quantized
        return _by_blocks(x.flatten(0, -2), BLOCK, 1).view_as(x)


def _by_blocks(x_MC: Tensor, rows: int, columns: int) -> Tensor:
    """Quantized with a scale for each rows x columns block; at the edges blocks are smaller."""
    m, c = x_MC.shape
    padded = F.pad(x_MC, (0, -c % columns, 0, -m % rows)).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = scale_of(padded.abs().amax((1, 3), keepdim=True), E4M3)
    power_of_two = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return quantize(padded, power_of_two, E4M3).flatten(2).flatten(0, 1)[:m, :c]


def emulation(settings: Fp8Config, split: frozenset[Operand], group: dist.ProcessGroup | None) -> Emulation:
    """The recipe's arithmetic for one linear (`split`, `group`: see `Current`)."""
    if settings.recipe == "delayed":
        return Delayed(settings.amax_history, settings.margin)
    if settings.recipe == "current":
        return Current(split, group)
    assert settings.recipe == "blockwise", settings.recipe
    return Blockwise()
