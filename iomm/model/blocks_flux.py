"""The blocks of the MM-DiT (FLUX; arXiv 2403.03206): two streams with their own weights, or one.

With sequence parallelism streams come and go as a rank's slices (T/tp, L/tp); between a column- and a
row-parallel linear they are whole.

L image tokens, T condition tokens, S = T + L, B samples, D hidden channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import GeneratorConfig
from iomm.model.layers import NORM_EPS, Modulation, QueryKeyNorm, attention, split_heads
from iomm.model.rope import Rope
from iomm.parallel.backend import Layers
from iomm_kernels.gated_residual import gated_residual
from iomm_kernels.gated_residual_modulate import gated_residual_modulate
from iomm_kernels.modulate import modulate


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, layers: Layers, config: GeneratorConfig) -> None:
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.first = layers.column(config.hidden_size, inner)
        self.second = layers.row(inner, config.hidden_size)

    def forward(self, x_LBD: Tensor) -> Tensor:
        return self.second(functional.gelu(self.first(x_LBD), approximate="tanh"))


class StreamWeights(nn.Module):
    """One stream's half of a double block."""

    def __init__(self, layers: Layers, config: GeneratorConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.head_size, self.kernels = d // config.heads, layers.kernels
        self.modulation = Modulation(layers, d, 6)
        self.qkv = layers.column(d, 3 * d)
        self.norm = QueryKeyNorm(layers, self.head_size)
        self.attention_out = layers.row(d, d)
        self.mlp = Mlp(layers, config)

    def project(
        self, x_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, rope_: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (normalised and turned) and v of the whole stream; `rope_` is of its tokens."""
        h_LBD = modulate(x_LBD, shift_BD, scale_BD, eps=NORM_EPS, provider=self.kernels)
        q, k, v = split_heads(self.qkv(h_LBD), self.head_size)
        return *self.norm(q, k, rope_), v

    def update(
        self,
        x_LBD: Tensor,
        attended: Tensor,
        gate_attention_BD: Tensor,
        shift_BD: Tensor,
        scale_BD: Tensor,
        gate_mlp_BD: Tensor,
    ) -> Tensor:
        y_LBD = self.attention_out(attended)
        x_LBD, h_LBD = gated_residual_modulate(
            x_LBD, gate_attention_BD, y_LBD, shift_BD, scale_BD, eps=NORM_EPS, provider=self.kernels
        )
        return gated_residual(x_LBD, gate_mlp_BD, self.mlp(h_LBD), provider=self.kernels)


class DoubleBlock(nn.Module):
    """Joint attention of two streams with separate weights.

    `last`: nothing reads the condition stream after this block, so its update is left out. The weights of
    that update are kept, frozen, because FLUX's layout has them; trained, they would wait for a gradient that
    never comes.
    """

    def __init__(self, layers: Layers, config: GeneratorConfig, *, last: bool) -> None:
        super().__init__()
        self.condition = StreamWeights(layers, config)
        self.image = StreamWeights(layers, config)
        self.attend = layers.attention(config.heads, config.hidden_size // config.heads)
        self.sequence_ranks, self.last = layers.sequence_ranks, last
        if last:
            self.condition.attention_out.requires_grad_(False)
            self.condition.mlp.requires_grad_(False)
            self.condition.norm.query.requires_grad_(False)

    def forward(
        self, c_TBD: Tensor, x_LBD: Tensor, time_BD: Tensor, rope_: Rope, attend_BS: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c_shift, c_scale, *c_gates = self.condition.modulation(time_BD)
        x_shift, x_scale, *x_gates = self.image.modulation(time_BD)
        t, x_length = (len(stream) * self.sequence_ranks for stream in (c_TBD, x_LBD))  # gathered
        cos_SP, sin_SP = rope_
        c_qkv = self.condition.project(c_TBD, c_shift, c_scale, (cos_SP[:t], sin_SP[:t]))
        x_qkv = self.image.project(x_LBD, x_shift, x_scale, (cos_SP[t:], sin_SP[t:]))
        q, k, v = (torch.cat(pair) for pair in zip(c_qkv, x_qkv, strict=True))
        if self.last:
            x_attended = attention(q[t:], k, v, attend_BS, self.attend)
        else:
            attended = attention(q, k, v, attend_BS, self.attend)
            c_attended, x_attended = attended.split((t, x_length))
            c_TBD = self.condition.update(c_TBD, c_attended, *c_gates)
        return c_TBD, self.image.update(x_LBD, x_attended, *x_gates)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence, one set of weights."""

    def __init__(self, layers: Layers, config: GeneratorConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.head_size, self.kernels = d // config.heads, layers.kernels
        self.modulation = Modulation(layers, d, 3)
        self.qkv = layers.column(d, 3 * d)
        self.norm = QueryKeyNorm(layers, self.head_size)
        self.attend = layers.attention(config.heads, self.head_size)
        self.mlp_in = layers.column(d, inner)
        # FLUX has one linear over [attention | mlp]; as two row-parallel ones each half splits by whole
        # columns.
        self.attention_out = layers.row(d, d, bias=False)
        self.mlp_out = layers.row(inner, d)

    def forward(self, s_SBD: Tensor, time_BD: Tensor, rope_: Rope, attend_BS: Tensor | None) -> Tensor:
        shift, scale, gate = self.modulation(time_BD)
        h = modulate(s_SBD, shift, scale, eps=NORM_EPS, provider=self.kernels)
        q, k, v = split_heads(self.qkv(h), self.head_size)
        q, k = self.norm(q, k, rope_)
        attended = attention(q, k, v, attend_BS, self.attend)
        mlp = self.mlp_out(functional.gelu(self.mlp_in(h), approximate="tanh"))
        return gated_residual(s_SBD, gate, self.attention_out(attended) + mlp, provider=self.kernels)
