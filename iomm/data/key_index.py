"""Where each of millions of keys stands: part and row, in 12 bytes a key (16 beyond four billion rows).

N keys of all parts.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class _Sorted(NamedTuple):
    """Replaced as one, because other threads look keys up meanwhile."""

    head_N: NDArray[np.uint64]  # first halves of the keys, sorted
    number_N: NDArray[np.integer]  # where each stands, counted over the rows of all parts
    starts: list[int]  # number of each part's first row, and of the next part's


class KeyIndex:
    """Keys of 32 hexadecimal digits, of which the first half is held. One thread adds, any may look up."""

    def __init__(self) -> None:
        self._state = _Sorted(np.empty(0, np.uint64), np.empty(0, np.uint32), [0])

    def __len__(self) -> int:
        return len(self._state.head_N)

    def add(self, heads: list[NDArray[np.uint64]]) -> None:
        """The keys of the next parts, each part's as its heads. Empties the list, which may be large."""
        if not heads:
            return
        old = self._state
        starts = [*old.starts, *(np.cumsum([len(h) for h in heads]) + old.starts[-1]).tolist()]
        head_N = np.concatenate([old.head_N, *heads])
        heads.clear()
        order_N = np.argsort(head_N, kind="stable")
        head_N = head_N[order_N]
        number_N = order_N.astype(np.uint32 if starts[-1] <= 1 << 32 else np.uint64)
        # Behind the rows that were known come the new ones, in order; those known have numbers already.
        known_N = order_N < len(old.number_N)
        number_N[known_N] = old.number_N[order_N[known_N]]
        self._state = _Sorted(head_N, number_N, starts)

    def find(self, key: str) -> Iterator[tuple[int, int]]:
        """Part and row of each key that has the same head."""
        state = self._state
        head = np.uint64(int.from_bytes(bytes.fromhex(key)[:8], "little"))
        for i in range(int(np.searchsorted(state.head_N, head)), len(state.head_N)):
            if state.head_N[i] != head:
                return
            number = int(state.number_N[i])
            part = bisect_right(state.starts, number) - 1
            yield part, number - state.starts[part]


def heads(keys_N: NDArray[np.void]) -> NDArray[np.uint64]:
    """The first half of each key of 16 bytes, (N,)."""
    return keys_N.view(np.dtype("<u8")).reshape(-1, 2)[:, 0].astype(np.uint64)
