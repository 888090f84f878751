"""Which blocks a pipeline rank holds: contiguous chunks of the list of blocks, balanced by cost.

interleaved, 2 ranks with 2 virtual stages each, 8 blocks of equal cost:
    rank 0   chunk 0: [0 1]          chunk 1: [4 5]
    rank 1   chunk 0: [2 3]          chunk 1: [6 7]
a micro-batch passes range 0, 1, 2, 3: chunk v of rank p is range v * pp + p
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """One virtual stage.

    `blocks` are numbers in the list of pipelined blocks: double blocks, then single blocks (z_image: single
    blocks). What stands before the blocks (embeddings, refiners) belongs to the `first` chunk, what stands
    behind them to the `last`.
    """

    first: bool
    last: bool
    blocks: range


def whole(blocks: int) -> Chunk:
    """The one chunk of a model that is not split."""
    return Chunk(first=True, last=True, blocks=range(blocks))


def split(costs: Sequence[float], chunks: int, *, first_cost: float = 0, last_cost: float = 0) -> list[range]:
    """Cut the list of blocks into contiguous ranges so that the most expensive one is as cheap as possible.

    Exact, by dynamic programming over (ranges, blocks); among equals the sum of squares decides, which evens
    out the rest. O(blocks^2 * chunks).

    Args:
        costs: of each block, in any unit (`iomm.model.flops.block_costs`).
        chunks: how many ranges; every one gets at least one block.
        first_cost: what the first range does besides its blocks (embeddings, refiners).
        last_cost: what the last one does besides.
    Raises:
        ValueError: fewer blocks than chunks.
    """
    blocks = len(costs)
    if not 1 <= chunks <= blocks:
        raise ValueError(
            f"{blocks} blocks cannot be cut into parallel.pp * parallel.virtual_stages = {chunks} chunks of "
            f"at least one block each. Lower parallel.pp or parallel.virtual_stages to at most {blocks} in "
            "product, or use a deeper generator."
        )
    total = list(itertools.accumulate(costs, initial=0.0))
    # best[end]: (most expensive range, sum of squares, cut points) of the blocks before `end`
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for k in range(chunks):
        extra = (first_cost if k == 0 else 0) + (last_cost if k == chunks - 1 else 0)
        ends = [blocks] if k == chunks - 1 else range(k + 1, blocks - (chunks - 1 - k) + 1)
        best = {
            end: min(
                (max(worst, cost), squares + cost**2, (*cuts, end))
                for start, (worst, squares, cuts) in best.items()
                if start < end
                for cost in [total[end] - total[start] + extra]
            )
            for end in ends
        }
    return [range(*pair) for pair in itertools.pairwise(best[blocks][2])]


def chunks_of(ranges: Sequence[range], pp_rank: int, pp_size: int) -> tuple[Chunk, ...]:
    """The chunks of one pipeline rank, by virtual stage.

    Args:
        ranges: from `split`; a multiple of `pp_size`.
    """
    assert len(ranges) % pp_size == 0, f"{len(ranges)} ranges over {pp_size} pipeline ranks"
    return tuple(
        Chunk(first=i == 0, last=i == len(ranges) - 1, blocks=ranges[i])
        for i in range(pp_rank, len(ranges), pp_size)
    )
