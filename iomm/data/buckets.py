"""Aspect-ratio buckets: images of a shape are trained on in a picture of about that shape.

    size table    up to 41 shapes between 1:4 and 4:1, all of about as many latent tokens as the square
    membership    each image belongs to the bucket whose ratio is nearest: one byte an image
    dealing       blocks of consecutive global sample indices are dealt to buckets by a table that repeats

All images of a block have one bucket, so all micro-batches within it have one size on all ranks. Blocks are
dealt in proportion to the images; nothing but the table and a count is needed to say which image stands at an
index.

K buckets, from tall to wide; N images of a source; P blocks of a period.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from iomm.data.mixture import exact_ratio

RATIOS, WIDEST = 41, 4.0
LEAST_TOKENS = 0.9  # of the square's
PERIOD_BLOCKS = 4096  # at least
_MOST_DIGITS = 10_000  # denominator of a mix ratio
_CHUNK = 4096  # images counted together
Size = tuple[int, int]  # height, width in pixels


def size_table(image_px: int, token_px: int) -> tuple[Size, ...]:
    """(height, width) in pixels of each bucket, for a square of `image_px` a side.

    Sides are whole tokens. No bucket has more tokens than the square, none less than 90 % of them, and each
    number of tokens is a multiple of 8 (4 and less for small squares) if the square's is, so that tensor
    parallelism can divide them.

    Raises:
        ValueError: the square is not made of whole tokens.
    """
    ratios = [WIDEST ** (step / (RATIOS // 2)) for step in range(-(RATIOS // 2), RATIOS // 2 + 1)]
    return tuple(dict.fromkeys(sizes_at(image_px, token_px, ratios)))


def sizes_at(image_px: int, token_px: int, ratios: Sequence[float]) -> tuple[Size, ...]:
    """The size nearest to each ratio (width / height) for a square of `image_px` a side; see `size_table`.

    Raises:
        ValueError: the square is not made of whole tokens.
    """
    if image_px < 1 or image_px % token_px:
        raise ValueError(
            f"a square of {image_px} px is not made of whole latent tokens of {token_px} px. Make "
            f"data.image_px and every size in data.progression a multiple of {token_px}."
        )
    grids = _grids((image_px // token_px) ** 2)

    def farness(grid: Size, ratio: float) -> tuple[float, int]:
        times = grid[1] / grid[0] / ratio
        return max(times, 1 / times), -grid[0] * grid[1]

    nearest = [min(grids, key=lambda grid, r=ratio: farness(grid, r)) for ratio in ratios]
    return tuple((rows * token_px, columns * token_px) for rows, columns in nearest)


def _grids(tokens: int) -> list[Size]:
    """Rows and columns of tokens that a bucket may have."""
    multiple = math.gcd(tokens, min(8, max(1, tokens // 64)))
    return [
        (rows, columns)
        for rows in range(1, tokens + 1)
        for columns in range(math.ceil(rows / WIDEST), min(tokens // rows, int(rows * WIDEST)) + 1)
        if rows * columns % multiple == 0 and rows * columns >= LEAST_TOKENS * tokens
    ]


class Members:
    """Which images of a source are in which bucket, and which is the n-th of a bucket. About 1.04 bytes an
    image."""

    def __init__(self, ids_N: NDArray[np.uint8], buckets: int) -> None:
        self._ids_N = ids_N
        chunks = range(0, len(ids_N), _CHUNK)
        counts = [np.bincount(ids_N[first : first + _CHUNK], minlength=buckets) for first in chunks]
        # Members of each bucket before each chunk, and in all.
        self._before = np.cumsum([np.zeros(buckets, np.int64), *counts], axis=0, dtype=np.int64).T.copy()

    @classmethod
    def of(cls, sizes: Iterable[NDArray[np.int32]], table: Sequence[Size], least_images: int) -> "Members":
        """Put every image into the bucket of the nearest ratio; one of unknown size into the squarest.

        Buckets of fewer than `least_images` images are closed, and theirs go to the nearest that is not; if
        all are too small the largest stays.

        Args:
            sizes: width and height of the images, (M, 2) at a time; 0: unknown.
        """
        ratios = np.array([width / height for height, width in table])
        borders = np.sqrt(ratios[1:] * ratios[:-1])
        squarest = int(np.argmin(np.maximum(ratios, 1 / ratios)))
        parts: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)]
        counts_K = np.zeros(len(table), np.int64)
        for size_M2 in sizes:
            known_M = size_M2[:, 1] > 0
            ratio_M = size_M2[:, 0] / np.where(known_M, size_M2[:, 1], 1)
            ids_M = np.where(known_M, np.searchsorted(borders, ratio_M), squarest).astype(np.uint8)
            counts_K += np.bincount(ids_M, minlength=len(table))
            parts.append(ids_M)
        kept = [b for b in range(len(table)) if counts_K[b] >= least_images] or [int(np.argmax(counts_K))]
        times = np.maximum(ratios[:, None] / ratios[kept], ratios[kept] / ratios[:, None])
        moved_K = np.array(kept, np.uint8)[np.argmin(times, axis=1)]
        # Part by part: an index array of all images would take eight bytes each.
        return cls(np.concatenate([moved_K[ids_M] for ids_M in parts]), len(table))

    @property
    def counts_K(self) -> NDArray[np.int64]:
        """Images of each bucket."""
        return self._before[:, -1]

    def bucket(self, number: int) -> int:
        """The bucket of an image."""
        return int(self._ids_N[number])

    def number(self, bucket: int, n: int) -> int:
        """The n-th image of a bucket."""
        chunk = int(np.searchsorted(self._before[bucket], n, side="right")) - 1
        ids = self._ids_N[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        inside = np.flatnonzero(ids == bucket)[n - self._before[bucket, chunk]]
        return chunk * _CHUNK + int(inside)


class Dealing:
    """Blocks of consecutive global sample indices to buckets.

    Args:
        images_K, pairs_K: images of each source in each bucket; None: never drawn from.
        mix_ratio: share of the samples that are images without captions.

    Raises:
        ValueError: a mix ratio of more than four decimals.
    """

    def __init__(
        self, images_K: NDArray[np.int64] | None, pairs_K: NDArray[np.int64] | None, mix_ratio: float
    ) -> None:
        share = exact_ratio(mix_ratio)
        if share.denominator > _MOST_DIGITS:
            raise ValueError(
                f"data.mix_ratio {mix_ratio} with data.buckets: at most four decimals, so that "
                "every bucket's share of images can be exact. Round it."
            )
        # Each source's blocks are dealt alone and add up, so the shares of both are exact in the sum.
        period = period_blocks(mix_ratio)
        images = _apportion(int(period * share), images_K)
        pairs = _apportion(period - int(period * share), pairs_K)
        blocks = [i + p for i, p in zip(images or [0] * len(pairs), pairs or [0] * len(images), strict=True)]
        self.mix: list[Fraction] = [
            Fraction(i, total) if total else share
            for i, total in zip(images or [0] * len(blocks), blocks, strict=True)
        ]
        # Each bucket's blocks stand at even distances.
        bucket_P = np.repeat(np.arange(len(blocks)), blocks)
        nth_P = np.concatenate([np.arange(count) for count in blocks])
        order_P = np.argsort((nth_P + 0.5) / np.repeat(blocks, blocks), kind="stable")
        self.blocks = blocks  # of each bucket in a period
        self._bucket_P, self._nth_P = bucket_P[order_P], nth_P[order_P]

    def at(self, block: int) -> tuple[int, int]:
        """The bucket of a block, and how many blocks of that bucket came before it."""
        period, slot = divmod(block, len(self._bucket_P))
        bucket = int(self._bucket_P[slot])
        return bucket, period * self.blocks[bucket] + int(self._nth_P[slot])


def period_blocks(mix_ratio: float) -> int:
    """Blocks after which the dealing repeats: a number whose share of images is whole."""
    unit = exact_ratio(mix_ratio).denominator
    return unit * -(-PERIOD_BLOCKS // unit)


def _apportion(blocks: int, counts_K: NDArray[np.int64] | None) -> list[int]:
    """Deal blocks in proportion to counts, by largest remainders; empty without counts."""
    if counts_K is None:
        return []
    counts = [int(count) for count in counts_K]
    total = sum(counts)
    shares = [blocks * count // total for count in counts]
    left = sorted(range(len(counts)), key=lambda b: (-(blocks * counts[b] % total), b))
    for bucket in left[: blocks - sum(shares)]:
        shares[bucket] += 1
    return shares
