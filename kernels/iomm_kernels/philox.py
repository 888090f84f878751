"""Philox4x32-10 of (seed, stream, global sample index, element), in PyTorch and in Triton with equal bits.

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (element // 4, sample low 32 bits, sample high 32 bits, stream)

(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.) Element e of a sample is word e % 4
of block e // 4. A uniform number is a word's upper 23 bits plus one half, times 2^-23: exact in fp32, and
never 0 or 1. So `uniform >= ratio` is a comparison of integers, `word >> 9 >= threshold(ratio)`, and a
kernel that compares integers decides as the CPU does.

B samples, n elements of each.
"""

import math
import struct

import torch
from torch import Tensor

from iomm_kernels.launch import jit, tl

_M32 = 0xFFFFFFFF


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


def words(seed: int, stream: int, index_B: Tensor, n: int) -> Tensor:
    """Unsigned 32-bit words as int64, shape (B, n); `index_B` holds global sample indices (int64)."""
    index = index_B.to(torch.int64)
    block = torch.arange((n + 3) // 4, device=index.device, dtype=torch.int64)[None]
    low, high = (
        (index & _M32)[:, None].expand(-1, block.shape[1]),
        ((index >> 32) & _M32)[:, None].expand(-1, block.shape[1]),
    )
    out = philox4x32((block.expand_as(low), low, high, torch.full_like(low, int(stream))), seed)
    return torch.stack(out, dim=-1).flatten(1)[:, :n]


def uniform(seed: int, stream: int, index_B: Tensor, n: int) -> Tensor:
    """fp32 in (0, 1), shape (B, n): the word's upper 23 bits plus one half, so that neither end is ever
    drawn."""
    return ((words(seed, stream, index_B, n) >> 9).to(torch.float32) + 0.5) * 2.0**-23


def normal(seed: int, stream: int, index_B: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers (B, n), by Box-Muller on neighbouring fp32 uniforms, computed in `dtype`."""
    u = uniform(seed, stream, index_B, 2 * ((n + 1) // 2)).to(dtype)
    radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0::2])), 2.0 * math.pi * u[:, 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)[:, :n]


def threshold(ratio: float) -> int:
    """The integer h with `word >> 9 >= h` exactly where `uniform >= fp32(ratio)`, the comparison PyTorch
    makes of an fp32 tensor with a Python number."""
    ratio = struct.unpack("f", struct.pack("f", ratio))[0]
    return max(0, math.ceil(ratio * 2.0**23 - 0.5))


def signed_seed(seed: int) -> int:
    """The seed's low 64 bits as an int64, which is what operators and kernels take; the bits drawn are the
    same."""
    if -(1 << 63) <= seed < 1 << 63:  # first, so that torch.compile meets no wider numbers
        return seed
    low = seed & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low


@jit
def philox_block(seed, stream: tl.constexpr, index, block):
    """The four uint32 words of each block. `index` (int64 sample indices) and `block` (int32) have one
    shape."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), low, high, low * 0 + stream)


@jit
def philox_element(seed, stream: tl.constexpr, index, element):
    """The uint32 word of each element (int32), whichever of its block's four it is."""
    w0, w1, w2, w3 = philox_block(seed, stream, index, element // 4)
    lane = element % 4
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@jit
def word_uniform(word):
    """fp32 in (0, 1) of a uint32 word."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@jit
def cos_sin_of_turns(u):
    """cos and sin of 2 pi u for u in [0, 1], to about an ulp: the nearest quarter turn is taken off exactly,
    Cephes' polynomials serve the rest. (CUDA's cosf and sinf spill for arguments that never come here.)"""
    quarter = tl.floor(4.0 * u + 0.5)
    angle = (u - 0.25 * quarter) * 6.283185307179586
    z = angle * angle
    sin = angle + angle * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = (
        1.0
        - 0.5 * z
        + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    )
    turned = (quarter == 1.0) | (quarter == 3.0)
    cos, sin = tl.where(turned, sin, cos), tl.where(turned, cos, sin)
    return (
        tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos),
        tl.where((quarter == 2.0) | (quarter == 3.0), -sin, sin),
    )


@jit
def normal_pair(word_a, word_b):
    """Two fp32 standard normal numbers of two neighbouring words."""
    radius = tl.sqrt_rn(-2.0 * tl.log(word_uniform(word_a)))
    cos, sin = cos_sin_of_turns(word_uniform(word_b))
    return radius * cos, radius * sin
