"""What one pipeline stage hands to the next: one tensor a micro-batch.

    packed_SBD = [time 1 | one stream | other stream]        along the sequence

The time embedding travels as a row, so that no stage needs a copy of its weights, and its gradient comes back
with the others'. With sequence parallelism over n ranks a rank holds the whole time row and its own slice of
each stream; a joint sequence gathered from [a_r | b_r] then runs [a_0 b_0 a_1 b_1 ...] (`joint_order`).

S rows, B samples, D hidden channels, M channels of the time embedding (M <= D; the rest of its row is zero).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from iomm.model.rope import Rope
from iomm.parallel.backend import Layers


class Geometry(NamedTuple):
    """What blocks must know of the tokens' places, of whole streams one behind the other: [a | b]."""

    rope_: Rope
    attend_BS: Tensor | None  # True where a key may be attended to; None: everywhere
    order: Tensor | None  # of a gathered joint sequence, see `joint_order`

    def joint(self) -> tuple[Rope, Tensor | None]:
        """Rotations and mask in the order of a gathered joint sequence."""
        if self.order is None:
            return self.rope_, self.attend_BS
        cos, sin = self.rope_
        attend_BS = None if self.attend_BS is None else self.attend_BS[:, self.order]
        return (cos[self.order], sin[self.order]), attend_BS


def pack(time_BM: Tensor, *streams: Tensor) -> Tensor:
    """[time | streams], a new tensor (S, B, D)."""
    channels = streams[0].shape[-1]
    return torch.cat((functional.pad(time_BM, (0, channels - time_BM.shape[-1]))[None], *streams))


def unpack(packed_SBD: Tensor, time_channels: int, *lengths: int) -> tuple[Tensor, ...]:
    """The time embedding (B, M) and streams of these lengths, as views."""
    assert packed_SBD.shape[0] == 1 + sum(lengths), f"{packed_SBD.shape[0]} rows, expected 1 + {lengths}"
    time_1BD, *streams = packed_SBD.split((1, *lengths))
    return time_1BD[0, :, :time_channels], *streams


def local_slice(layers: Layers, x_BLC: Tensor, length: int) -> Tensor:
    """This rank's `length` tokens of a sequence, sequence first, in the weights' dtype; zeros fill up what is
    missing at its end."""
    x_LBC = x_BLC.to(layers.config.params_dtype).transpose(0, 1)
    pads = length * layers.sequence_ranks - len(x_LBC)
    return layers.scatter(functional.pad(x_LBC, (0, 0, 0, 0, 0, pads)) if pads else x_LBC)


def local_length(tokens: int, ranks: int, what: str) -> int:
    """Tokens of a rank's slice.

    Raises:
        ValueError: they do not divide over the ranks.
    """
    if tokens % ranks:
        raise ValueError(
            f"{tokens} {what} tokens are not divisible by parallel.tp = {ranks}, over which sequence "
            "parallelism splits them. Set parallel.sequence_parallel=false, or choose a parallel.tp or an "
            "image size that divides."
        )
    return tokens // ranks


def joint_order(a: int, b: int, ranks: int, device: torch.device) -> Tensor | None:
    """Where each row of a gathered joint sequence stands in [a | b]; None: they are the same.

    Args:
        a, b: lengths of the two whole streams, divisible by `ranks`.
    """
    if ranks == 1:
        return None
    slices = torch.arange(a, device=device).chunk(ranks), torch.arange(a, a + b, device=device).chunk(ranks)
    return torch.cat([part for pair in zip(*slices, strict=True) for part in pair])
