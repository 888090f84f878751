"""Randomness as a function: Philox4x32-10 of (seed, stream, global sample index, element).

Everything random in a run - mask, noise, timestep, caption dropout, order - is such a function, never a
stateful generator, so it does not depend on the rank, the number of ranks, the micro-batch size or the order
of steps. The bits equal Triton's `tl.randint4x` with the same key and counters (Salmon et al., SC 2011), so
kernels can draw the same numbers.

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (element // 4, sample low 32 bits, sample high 32 bits, stream)

L is the number of elements drawn for each of B samples.
"""

import enum
import math

import torch
from torch import Tensor

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


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m, for a in [0, 2^32) held in int64, without overflow."""
    p, q = (a & 0xFFFF) * m, (a >> 16) * m
    low = p + ((q & 0xFFFF) << 16)
    return ((q >> 16) + (low >> 32)) & _M32, low & _M32


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. Counters and results are int64 tensors of one broadcast shape holding
    unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    for _ in range(10):
        h0, l0 = _mul_hi_lo(c0, 0xD2511F53)
        h1, l1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return c0, c1, c2, c3


def words(seed: int, stream: Stream, index_B: Tensor, n: int) -> Tensor:
    """Unsigned 32-bit words as int64, shape (B, n); `index_B` holds global sample indices (int64)."""
    index = index_B.to(torch.int64)
    block = torch.arange((n + 3) // 4, device=index.device, dtype=torch.int64)[None]
    low, high = (
        (index & _M32)[:, None].expand(-1, block.shape[1]),
        ((index >> 32) & _M32)[:, None].expand(-1, block.shape[1]),
    )
    out = philox4x32((block.expand_as(low), low, high, torch.full_like(low, int(stream))), seed)
    return torch.stack(out, dim=-1).flatten(1)[:, :n]


def uniform(seed: int, stream: Stream, index_B: Tensor, n: int) -> Tensor:
    """fp32 in (0, 1), shape (B, n): the word's upper 23 bits plus one half, so that neither end is ever
    drawn."""
    return ((words(seed, stream, index_B, n) >> 9).to(torch.float32) + 0.5) * 2.0**-23


def normal(seed: int, stream: Stream, index_B: Tensor, n: int) -> Tensor:
    """Standard normal fp32, shape (B, n), by Box-Muller on neighbouring uniforms."""
    u = uniform(seed, stream, index_B, 2 * ((n + 1) // 2))
    radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0::2])), 2.0 * math.pi * u[:, 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)[:, :n]


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
