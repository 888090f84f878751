"""Decoded samples, and which of them a rank trains on in a step.

B = samples of a batch, C = 3 channels, H x W pixels, the same for all samples of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iomm.data.view import View


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded sample."""

    index: int  # global sample index; in a held-out batch the position there
    key: str  # the sample key in its shard
    content_hash: str  # `cache_key` of the image file
    view: View  # what of the image is shown
    image_CHW: Tensor  # uint8
    caption: str | None  # None for an image-only sample, even if its shard has a caption


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples stacked, in the order of the indices asked for."""

    index_B: Tensor  # int64, on the CPU
    keys: tuple[str, ...]
    hashes: tuple[str, ...]
    views: tuple[View, ...]
    image_BCHW: Tensor  # uint8; on the CPU, or where DALI decoded it
    captions: tuple[str | None, ...]

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of all its images."""
        height, width = self.image_BCHW.shape[2:]
        return height, width

    @staticmethod
    def stack(samples: Sequence[Sample], image_BCHW: Tensor | None = None) -> "Batch":
        """A batch of at least one sample, all of one size. `image_BCHW`: their images, if they already lie
        in one tensor."""
        if image_BCHW is None:
            image_BCHW = torch.stack([s.image_CHW for s in samples])
        return Batch(
            index_B=torch.tensor([s.index for s in samples], dtype=torch.int64),
            keys=tuple(s.key for s in samples),
            hashes=tuple(s.content_hash for s in samples),
            views=tuple(s.view for s in samples),
            image_BCHW=image_BCHW,
            captions=tuple(s.caption for s in samples),
        )

    def take(self, rows: Sequence[int]) -> "Batch":
        """The samples at these positions of the batch, in their order."""
        return Batch(
            index_B=self.index_B[list(rows)],
            keys=tuple(self.keys[i] for i in rows),
            hashes=tuple(self.hashes[i] for i in rows),
            views=tuple(self.views[i] for i in rows),
            image_BCHW=self.image_BCHW[list(rows)],
            captions=tuple(self.captions[i] for i in rows),
        )


def global_batch_indices(
    step: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Global sample indices of one rank's micro-batches at one step.

    Step s covers [s * global_batch, (s + 1) * global_batch). Each micro-batch covers micro_batch * dp_size
    consecutive samples, of which rank r takes the r-th slice, so all ranks together see the same samples
    whatever the split.

    Raises:
        ValueError: global_batch is not divisible by micro_batch * dp_size, or a number is out of range.
    """
    if step < 0 or min(global_batch, micro_batch, dp_size) < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"step {step}, global batch {global_batch}, micro-batch {micro_batch}, data-parallel rank "
            f"{dp_rank} of {dp_size}: the step must not be negative, sizes must be at least 1, and "
            "the rank must lie in [0, dp_size)."
        )
    across = micro_batch * dp_size
    if global_batch % across:
        raise ValueError(
            f"global batch {global_batch} is not divisible by micro-batch * data-parallel size = "
            f"{micro_batch}*{dp_size} = {across}. "
            "Change train.global_batch_images or train.micro_batch_images, or launch another number of ranks."
        )
    starts = range(step * global_batch + dp_rank * micro_batch, (step + 1) * global_batch, across)
    return [list(range(start, start + micro_batch)) for start in starts]
