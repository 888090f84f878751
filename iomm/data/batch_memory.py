"""Memory that batches of images are decoded into, used again and again.

A batch of 20 images of 512 px is 16 MB; asking the system for such a block each time, which clears it page by
page, costs about 5 % of what decoding costs.
"""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor


class BatchMemory:
    """Blocks of memory, each lent to one tensor at a time. Safe to call from several threads."""

    def __init__(self, blocks: int) -> None:
        """
        Args:
            blocks: how many are kept; with more in use at once, the others are the system's again after use.
        """
        self._blocks = blocks
        self._lock = threading.Lock()
        # The tensor's storage holds the view, which holds the block: a dead reference means a free block.
        self._lent: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor on the CPU, contiguous, of any content. Its memory is lent again when nothing refers
        to it any more, views of it included.
        """
        size = math.prod(shape)
        with self._lock:
            free = [lent for lent in self._lent if lent[1]() is None]
            fitting = [lent for lent in free if lent[0].size >= size]
            if fitting:
                chosen = min(fitting, key=lambda lent: lent[0].size)
                block = chosen[0]
                self._lent = [lent for lent in self._lent if lent is not chosen]
            else:  # none is large enough: one of the smaller ones makes room
                block = np.empty(size, np.uint8)
                if free and len(self._lent) >= self._blocks:
                    self._lent = [lent for lent in self._lent if lent is not free[0]]
            view = block[:size].reshape(shape)
            if len(self._lent) < self._blocks:
                self._lent.append((block, weakref.ref(view)))
            return torch.from_numpy(view)
