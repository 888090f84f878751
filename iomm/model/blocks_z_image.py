"""The block of Z-Image's transformer: attention, then SwiGLU, each between two RMSNorms.

With sequence parallelism a stream comes and goes as a rank's slice (S/tp); between a column- and a
row-parallel linear it is whole.

L or S tokens, B samples, D hidden channels, M channels of the time embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import GeneratorConfig
from iomm.model.layers import QueryKeyNorm, attention, split_heads, zero_init
from iomm.model.rope import Rope
from iomm.parallel.backend import Layers
from iomm_kernels.gated_residual import gated_residual

NORM_EPS = 1e-5
MODULATION_CHANNELS = 256  # at most; a narrower model has its own width


def modulation_channels(hidden_size: int) -> int:
    """M."""
    return min(hidden_size, MODULATION_CHANNELS)


def mlp_width(hidden_size: int) -> int:
    """Inner channels of the SwiGLU."""
    return int(hidden_size / 3 * 8)


class RmsNorm(nn.Module):
    """RMSNorm over all channels, with weights or without."""

    def __init__(self, layers: Layers, channels: int, *, affine: bool = True) -> None:
        super().__init__()
        self.channels = channels
        dtype = layers.config.params_dtype
        self.weight = nn.Parameter(torch.empty(channels, dtype=dtype)) if affine else None

    def forward(self, x_LBD: Tensor) -> Tensor:
        return functional.rms_norm(x_LBD, (self.channels,), self.weight, NORM_EPS)


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x), no biases."""

    def __init__(self, layers: Layers, hidden_size: int) -> None:
        super().__init__()
        inner = mlp_width(hidden_size)
        self.gate = layers.column(hidden_size, inner, bias=False)
        self.up = layers.column(hidden_size, inner, bias=False)
        self.down = layers.row(inner, hidden_size, bias=False)

    def forward(self, x_LBD: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x_LBD)) * self.up(x_LBD))


class Block(nn.Module):
    """Attention, then SwiGLU, each between two RMSNorms. A modulated block scales behind the first norm and
    gates, by tanh, behind the second."""

    def __init__(self, layers: Layers, config: GeneratorConfig, *, modulated: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.head_size, self.kernels = d // config.heads, layers.kernels
        self.qkv = layers.column(d, 3 * d, bias=False)
        self.norm = QueryKeyNorm(layers, self.head_size, eps=NORM_EPS)
        self.attend = layers.attention(config.heads, self.head_size)
        self.attention_out = layers.row(d, d, bias=False)
        self.mlp = SwiGlu(layers, d)
        self.attention_norm_in = RmsNorm(layers, d, affine=config.norm_affine)
        self.attention_norm_out = RmsNorm(layers, d, affine=config.norm_affine)
        self.mlp_norm_in = RmsNorm(layers, d, affine=config.norm_affine)
        self.mlp_norm_out = RmsNorm(layers, d, affine=config.norm_affine)
        self.modulation = zero_init(layers.replicated(modulation_channels(d), 4 * d)) if modulated else None

    def forward(self, s_SBD: Tensor, time_BM: Tensor, rope_: Rope, attend_BS: Tensor | None) -> Tensor:
        scale_attention = gate_attention = scale_mlp = gate_mlp = None
        if self.modulation is not None:
            scale_attention, gate_attention, scale_mlp, gate_mlp = self.modulation(time_BM).chunk(4, dim=-1)
        h = scaled(self.attention_norm_in(s_SBD), scale_attention)
        q, k, v = split_heads(self.qkv(h), self.head_size)
        q, k = self.norm(q, k, rope_)
        attended = attention(q, k, v, attend_BS, self.attend)
        update = self.attention_norm_out(self.attention_out(attended))
        s_SBD = self._add(s_SBD, gate_attention, update)
        mlp = self.mlp(scaled(self.mlp_norm_in(s_SBD), scale_mlp))
        return self._add(s_SBD, gate_mlp, self.mlp_norm_out(mlp))

    def _add(self, s_SBD: Tensor, gate_BD: Tensor | None, update_SBD: Tensor) -> Tensor:
        if gate_BD is None:
            return s_SBD + update_SBD
        return gated_residual(s_SBD, gate_BD.tanh(), update_SBD, provider=self.kernels)


def scaled(x_SBD: Tensor, scale_BD: Tensor | None) -> Tensor:
    return x_SBD if scale_BD is None else x_SBD * (1 + scale_BD)
