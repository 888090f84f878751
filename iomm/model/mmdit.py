"""The generator: a multimodal diffusion transformer of the FLUX family (MM-DiT, arXiv 2403.03206; method.md
section 3).

    image tokens ----> x_in ---+                                     +--> norm, modulate, out --> velocity |
    clean latent
                               +--> double blocks --> single blocks -+
    condition tokens -> c_in --+        (joint attention over [condition | image])

Double blocks keep separate weights for the two streams, single blocks share them. Every block is steered by
the time embedding (adaLN). Positions: condition tokens sit at (0, 0, 0), image tokens at (0, row, column).

B samples, L image tokens, T condition tokens, S = T + L, D hidden channels, E condition channels, C numbers
in a token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import GeneratorConfig
from iomm.model.layers import (
    Modulation,
    QueryKeyNorm,
    VectorEmbedding,
    attention,
    modulate,
    split_heads,
    timestep_embedding,
    zero_init,
)
from iomm.model.rope import Rope, rope, rotate
from iomm.parallel.backend import Layers

SINUSOIDS = 256  # numbers that a timestep or a guidance scale is spread into


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
        self.head_size = d // config.heads
        self.modulation = Modulation(layers, d, 6)
        self.qkv = layers.column(d, 3 * d)
        self.norm = QueryKeyNorm(layers, self.head_size)
        self.attention_out = layers.row(d, d)
        self.mlp = Mlp(layers, config)

    def project(self, x_LBD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.qkv(modulate(x_LBD, shift_BD, scale_BD)), self.head_size)
        return *self.norm(q, k), v

    def update(
        self,
        x_LBD: Tensor,
        attended: Tensor,
        gate_attention_BD: Tensor,
        shift_BD: Tensor,
        scale_BD: Tensor,
        gate_mlp_BD: Tensor,
    ) -> Tensor:
        x_LBD = x_LBD + gate_attention_BD * self.attention_out(attended)
        return x_LBD + gate_mlp_BD * self.mlp(modulate(x_LBD, shift_BD, scale_BD))


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
        self.last = last
        if last:
            self.condition.attention_out.requires_grad_(False)
            self.condition.mlp.requires_grad_(False)
            self.condition.norm.query.requires_grad_(False)

    def forward(
        self, c_TBD: Tensor, x_LBD: Tensor, time_BD: Tensor, rope_: Rope, attend_BS: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c_shift, c_scale, *c_gates = self.condition.modulation(time_BD)
        x_shift, x_scale, *x_gates = self.image.modulation(time_BD)
        c_qkv, x_qkv = (
            self.condition.project(c_TBD, c_shift, c_scale),
            self.image.project(x_LBD, x_shift, x_scale),
        )
        q, k, v = (torch.cat(pair) for pair in zip(c_qkv, x_qkv, strict=True))
        q, k = rotate(q, rope_), rotate(k, rope_)
        t = c_TBD.shape[0]
        if self.last:
            x_attended = attention(q[t:], k, v, attend_BS)
        else:
            c_attended, x_attended = attention(q, k, v, attend_BS).split((t, x_LBD.shape[0]))
            c_TBD = self.condition.update(c_TBD, c_attended, *c_gates)
        return c_TBD, self.image.update(x_LBD, x_attended, *x_gates)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence, one set of weights."""

    def __init__(self, layers: Layers, config: GeneratorConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.head_size = d // config.heads
        self.modulation = Modulation(layers, d, 3)
        self.qkv = layers.column(d, 3 * d)
        self.norm = QueryKeyNorm(layers, self.head_size)
        self.mlp_in = layers.column(d, inner)
        # FLUX has one linear over [attention | mlp]; as two row-parallel ones each half splits by whole
        # columns.
        self.attention_out = layers.row(d, d, bias=False)
        self.mlp_out = layers.row(inner, d)

    def forward(self, s_SBD: Tensor, time_BD: Tensor, rope_: Rope, attend_BS: Tensor | None) -> Tensor:
        shift, scale, gate = self.modulation(time_BD)
        h = modulate(s_SBD, shift, scale)
        q, k, v = split_heads(self.qkv(h), self.head_size)
        q, k = self.norm(q, k)
        attended = attention(rotate(q, rope_), rotate(k, rope_), v, attend_BS)
        mlp = self.mlp_out(functional.gelu(self.mlp_in(h), approximate="tanh"))
        return s_SBD + gate * (self.attention_out(attended) + mlp)


class MMDiT(nn.Module):
    """The whole generator. Its output means what `config.predict` says."""

    def __init__(self, config: GeneratorConfig, layers: Layers) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.image_in = layers.replicated(config.token_channels, d)
        self.condition_in = layers.replicated(config.condition_width, d)
        self.time = VectorEmbedding(layers, SINUSOIDS, d)
        self.guidance = VectorEmbedding(layers, SINUSOIDS, d) if config.guidance_embedding else None
        self.pooled = None if config.pooled_width is None else VectorEmbedding(layers, config.pooled_width, d)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(layers, config, last=config.single_blocks == 0 and i == config.double_blocks - 1)
            for i in range(config.double_blocks)
        )
        self.single_blocks = nn.ModuleList(SingleBlock(layers, config) for _ in range(config.single_blocks))
        self.out_modulation = Modulation(layers, d, 2)
        self.out = zero_init(layers.replicated(d, config.token_channels))

    def forward(
        self,
        x_t_BLC: Tensor,
        t_B: Tensor,
        condition_BTE: Tensor,
        positions_L3: Tensor,
        attend_BT: Tensor | None = None,
        *,
        pooled_BP: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """Predict for noisy tokens.

        Args:
            x_t_BLC: noisy latent tokens.
            t_B: timesteps in [0, 1], 1 = noise.
            condition_BTE: condition tokens.
            positions_L3: (frame, row, column) of each image token.
            attend_BT: True where a condition token counts; None: all do.
            pooled_BP: pooled text vectors, exactly if `config.pooled_width` is set.
            guidance_B: guidance scales, exactly if `config.guidance_embedding`.
        Returns:
            (B, L, C), velocity or clean latent.
        Raises:
            ValueError: an input that the model was not built for, or one that is missing.
        """
        dtype = self.image_in.weight.dtype
        x_LBD = self.image_in(x_t_BLC.to(dtype).transpose(0, 1))
        c_TBD = self.condition_in(condition_BTE.to(dtype).transpose(0, 1))
        time_BD = self._steering(t_B, pooled_BP, guidance_B)
        positions_S3 = torch.cat((positions_L3.new_zeros(c_TBD.shape[0], 3), positions_L3))
        rope_ = rope(positions_S3, self.config.rope_axes, self.config.rope_theta, dtype)
        attend_BS = None if attend_BT is None else functional.pad(attend_BT, (0, x_LBD.shape[0]), value=True)
        for block in self.double_blocks:
            c_TBD, x_LBD = block(c_TBD, x_LBD, time_BD, rope_, attend_BS)
        if self.single_blocks:
            s_SBD = torch.cat((c_TBD, x_LBD))
            for block in self.single_blocks:
                s_SBD = block(s_SBD, time_BD, rope_, attend_BS)
            x_LBD = s_SBD[c_TBD.shape[0] :]
        scale, shift = self.out_modulation(time_BD)
        return self.out(modulate(x_LBD, shift, scale)).transpose(0, 1)

    def _steering(self, t_B: Tensor, pooled_BP: Tensor | None, guidance_B: Tensor | None) -> Tensor:
        """What modulates every block (B, D): SiLU (which every user applies first) of the time's embedding,
        plus that of the guidance and that of the pooled text if the model has them."""
        _check_input("guidance_B", guidance_B, "guidance_embedding", self.guidance)
        _check_input("pooled_BP", pooled_BP, "pooled_width", self.pooled)
        total_BD = self.time(timestep_embedding(t_B, SINUSOIDS))
        if self.guidance is not None and guidance_B is not None:
            total_BD = total_BD + self.guidance(timestep_embedding(guidance_B, SINUSOIDS))
        if self.pooled is not None and pooled_BP is not None:
            total_BD = total_BD + self.pooled(pooled_BP)
        return functional.silu(total_BD)


def _check_input(what: str, given: Tensor | None, setting: str, module: nn.Module | None) -> None:
    if (given is None) != (module is None):
        raise ValueError(
            f"{what} is {'missing' if given is None else 'given'}, but the model was built "
            f"{'without' if module is None else 'with'} that input. Give it exactly if generator.{setting} "
            "is set."
        )


def unvaried_inputs(config: GeneratorConfig, samples: int, device: torch.device) -> dict[str, Tensor]:
    """The inputs of imported FLUX.1 weights that no run of ours varies, as keyword arguments of
    `MMDiT.forward`; empty for models without them.

    The pooled text vector is zero: the text speaks through the condition tokens alone, and a linear of zeros
    is a constant that training adapts. The guidance is the constant `config.guidance_value`.
    """
    inputs = {}
    if config.pooled_width is not None:
        inputs["pooled_BP"] = torch.zeros(samples, config.pooled_width, device=device)
    if config.guidance_embedding:
        inputs["guidance_B"] = torch.full((samples,), config.guidance_value, device=device)
    return inputs
