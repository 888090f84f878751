"""Randomness as a function: Philox4x32-10 of (seed, stream, global sample index, element).

Everything random in a run - mask, noise, timestep, caption dropout, order - is such a function, never a
stateful generator, so it does not depend on the rank, the number of ranks, the micro-batch size or the order
of steps. The draws are `iomm_kernels.philox`'s, so kernels draw the same numbers.
"""

import enum

from iomm_kernels.philox import normal, philox4x32, uniform, words

__all__ = ["Stream", "normal", "permute", "philox4x32", "uniform", "words", "words_of"]

_M32 = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """One independent sequence for each use. Numbers are part of the checkpoint contract: never reuse or
    renumber."""

    NOISE = 1
    TIMESTEP = 2
    MASK = 3
    NULL = 4
    ORDER = 5
    AUGMENT = 6
    SAMPLE = 7  # starting noise of generated pictures
    INIT = 8  # weights
    POSTERIOR = 9  # latents drawn from the autoencoder's distribution (codec.sample)


def words_of(seed: int, stream: int, index: int) -> tuple[int, int, int, int]:
    """The first four of `words` for one sample index: the same numbers by plain integers, for threads that
    handle samples one by one."""
    c0, c1, c2, c3 = 0, index & _M32, (index >> 32) & _M32, stream
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd & _M32, (even >> 32) ^ c3 ^ k1, even & _M32
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return c0, c1, c2, c3


def permute(position: int, length: int, seed: int, epoch: int) -> int:
    """The `position`-th entry of the permutation of range(length) that belongs to (seed, epoch).

    A four-round Feistel network over the next power of four, walked until it lands inside the range: no list
    is held, so 11 million entries cost nothing.
    """
    if not 0 <= position < length:
        raise ValueError(f"position {position} is outside the permutation's range [0, {length}).")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for round_ in range(4):
            left, right = right, left ^ (_mix(right, seed, epoch, round_) & mask)
        value = (left << half) | right
        if value < length:
            return value


def _mix(value: int, seed: int, epoch: int, round_: int) -> int:
    """64-bit finaliser of splitmix64 over all four inputs."""
    m64 = 0xFFFFFFFFFFFFFFFF
    z = (
        value
        + 0x9E3779B97F4A7C15
        * (1 + seed + 0x632BE59BD9B4E019 * (1 + epoch) + 0xD1B54A32D192ED03 * (1 + round_))
    ) & m64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & m64
    return z ^ (z >> 31)
