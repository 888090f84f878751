"""Z-Image's padding: each stream is filled up to a multiple of 32 tokens, rows keep their own lengths.

B samples, L image tokens, T condition tokens, both as padded where not said otherwise.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PAD_MULTIPLE = 32  # tokens of a stream are filled up to a multiple of this


def padded(tokens: int) -> int:
    """The multiple of 32 at or above."""
    return tokens + -tokens % PAD_MULTIPLE


class Lengths(NamedTuple):
    """Condition tokens of a batch."""

    total_T: int  # rows of the stream
    padded_B: Tensor | None  # tokens of each sample and its own pads, behind which nothing counts; None: all


def lengths(
    condition_tokens: int, attend_BT: Tensor | None, samples: int, total_T: int, device: torch.device
) -> Lengths:
    """Of a stream of `total_T` rows; `condition_tokens` and `attend_BT` are as given, without pads."""
    if attend_BT is not None:
        counts_B = attend_BT.sum(1)
        return Lengths(total_T, counts_B + -counts_B % PAD_MULTIPLE)
    length = padded(condition_tokens)
    return Lengths(total_T, None if total_T == length else torch.full((samples,), length, device=device))


def compact(condition_BTE: Tensor, attend_BT: Tensor | None) -> Tensor:
    """Move each row's tokens that count to the front, in their order."""
    if attend_BT is None:
        return condition_BTE
    order_BT = (~attend_BT).to(torch.uint8).argsort(dim=1, stable=True)
    return condition_BTE.gather(1, order_BT[..., None].expand_as(condition_BTE))


def fill(x_LBD: Tensor, token_1D: Tensor, count: int | Tensor, first: int) -> Tensor:
    """Replace what lies behind a row's count, (B,) or one for all, by the pad token.

    The token enters by `where` even if nothing is to be filled, so that its gradient always exists: the
    overlapped reduction of gradients waits for every trained parameter.

    Args:
        first: the place of the first token here in the whole stream.
    """
    index_L1 = torch.arange(first, first + len(x_LBD), device=x_LBD.device)[:, None]
    return torch.where((index_L1 >= count)[..., None], token_1D, x_LBD)


def positions(positions_L3: Tensor, padded_L: int, condition: Lengths) -> Tensor:
    """Rotary positions of [image | condition]: (S, 3), or (S, B, 3) where rows differ.

    Args:
        positions_L3: (frame, row, column) of the image tokens without pads; frames count from 0.
    """
    device, pads = positions_L3.device, padded_L - len(positions_L3)
    condition_T3 = functional.pad(torch.arange(1, condition.total_T + 1, device=device)[:, None], (0, 2))
    if condition.padded_B is None:
        image_L3 = positions_L3 + functional.pad(torch.tensor([condition.total_T + 1], device=device), (0, 2))
        return torch.cat((functional.pad(image_L3, (0, 0, 0, pads)), condition_T3))
    first_B3 = functional.pad(condition.padded_B[:, None] + 1, (0, 2))
    image_LB3 = functional.pad(positions_L3[:, None] + first_B3, (0, 0, 0, 0, 0, pads))
    return torch.cat((image_LB3, condition_T3[:, None].expand(-1, len(first_B3), -1)))
