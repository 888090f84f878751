"""Pieces both block kinds use. Sequences come first inside the generator (L, B, D), as sequence parallelism
wants them.

B samples, L tokens, D channels, H heads on this rank, K channels of a head.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.model.rope import Rope
from iomm.parallel.backend import Layers
from iomm_kernels.qk_norm_rope import qk_norm_rope

NORM_EPS = 1e-6


def timestep_embedding(
    t_B: Tensor, channels: int, scale: float = 1000.0, max_period: float = 10_000.0
) -> Tensor:
    """Sinusoids of `scale * t`, cosines first (FLUX; DDPM eq. of Vaswani et al.). (B, channels), fp32 or
    better."""
    half = channels // 2
    dtype = torch.promote_types(t_B.dtype, torch.float32)
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half
    )
    angle = t_B.to(dtype)[:, None] * scale * frequency.to(dtype)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def zero_init(linear: nn.Module) -> nn.Module:
    """Mark a linear so that `initialize` sets it to zero (adaLN-zero, arXiv 2212.09748 section 3.2)."""
    for parameter in linear.parameters():
        parameter.init_std = 0.0  # type: ignore[attr-defined]
    return linear


class VectorEmbedding(nn.Module):
    """A vector a sample (B, C) -> (B, D): two linears, SiLU between."""

    def __init__(self, layers: Layers, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.first = layers.replicated(channels, hidden_size)
        self.second = layers.replicated(hidden_size, hidden_size)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.second(functional.silu(self.first(x_BC.to(self.first.weight.dtype))))


class Modulation(nn.Module):
    """adaLN: n vectors (B, D) from the activated time embedding, zero at the start of training."""

    def __init__(self, layers: Layers, hidden_size: int, n: int) -> None:
        super().__init__()
        self.n = n
        self.linear = zero_init(layers.replicated(hidden_size, n * hidden_size))

    def forward(self, time_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(time_BD).chunk(self.n, dim=-1)


class QueryKeyNorm(nn.Module):
    """RMSNorm over each head's channels, separate weights for queries and keys (FLUX), then the rotary
    embedding."""

    def __init__(self, layers: Layers, head_size: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.query = layers.head_norm(head_size)
        self.key = layers.head_norm(head_size)
        self.eps, self.kernels = eps, layers.kernels

    def forward(self, q_LBHK: Tensor, k_LBHK: Tensor, rope_: Rope) -> tuple[Tensor, Tensor]:
        cos_LP, sin_LP = rope_
        weights = self.query(), self.key()
        return qk_norm_rope(q_LBHK, k_LBHK, *weights, cos_LP, sin_LP, self.eps, provider=self.kernels)


def split_heads(qkv_LBE: Tensor, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused projection -> q, k, v (L, B, H, K). Output features run (head, q|k|v, channel), so that a
    tensor-parallel rank's contiguous slice holds whole heads."""
    q, k, v = qkv_LBE.unflatten(-1, (-1, 3, head_size)).unbind(-2)
    return q, k, v


def attention(
    q_LBHK: Tensor,
    k_LBHK: Tensor,
    v_LBHK: Tensor,
    attend_BL: Tensor | None,
    own: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """Full attention -> (L, B, H * K).

    Args:
        attend_BL: True where a key may be attended to; None: everywhere.
        own: the backend's, if it has one, for the latter (`Layers.attention`).
    """
    if own is not None and attend_BL is None:
        return own(q_LBHK, k_LBHK, v_LBHK)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_LBHK, k_LBHK, v_LBHK))
    mask = None if attend_BL is None else attend_BL[:, None, None, :]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(2, 0, 1, 3).flatten(2)
