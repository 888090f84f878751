"""The order of a source's samples in an epoch: a permutation computed position by position, no list held.

    position -> within its block, a permutation of the block's positions
             -> run by run, a permutation of the runs of the whole source -> sample number

A run is a stretch of neighbouring samples. A block of `block_images` positions is made of 16 runs from
anywhere in the source and is shuffled within itself: at any time reads fall into 16 stretches of the shards,
which disks, file systems and object stores like, and still neighbours in a shard are not neighbours in a
batch. A source that fits into one block is shuffled as a whole.
"""

from iomm.random import permute

RUNS = 16  # of a block
# Set the permutation of runs, and those of the blocks, apart from each other.
_RUN_SEED, _BLOCK_SEED = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def shuffled(position: int, length: int, seed: int, epoch: int, block_images: int) -> int:
    """Number of the sample at a position of an epoch.

    Args:
        position: in [0, length).
        length: samples of the source.
        seed, epoch: which permutation.
        block_images: positions that are shuffled among themselves, at least 1.

    Raises:
        ValueError: a position outside the range.
    """
    if length <= block_images or not 0 <= position < length:
        return permute(position, length, seed, epoch)
    block, offset = divmod(position, block_images)
    size = min(block_images, length - block * block_images)
    offset = permute(offset, size, seed + _BLOCK_SEED * (1 + block), epoch)
    return _moved(
        block * block_images + offset, length, seed ^ _RUN_SEED, epoch, max(1, block_images // RUNS)
    )


def _moved(position: int, length: int, seed: int, epoch: int, run_images: int) -> int:
    """`position` after the runs have changed places. The samples behind the last whole run keep together, at
    a place of their own among the runs."""
    runs, rest = divmod(length, run_images)
    short = permute(0, runs + 1, seed + 1, epoch) * run_images  # where those stand
    if short <= position < short + rest:
        return runs * run_images + position - short
    if position >= short + rest:
        position -= rest
    run, offset = divmod(position, run_images)
    return permute(run, runs, seed, epoch) * run_images + offset
