"""The other generator: a single-stream diffusion transformer, Z-Image's (arXiv 2511.22699).

    image tokens -----> image_in -----> noise refiner (modulated) ---+
                                                                     +--> single blocks --> norm, scale, out
    condition tokens -> condition_in -> context refiner -------------+    over [image | condition]

Equal to diffusers' `ZImageTransformer2DModel` number for number. What differs is converted here, at the
boundary:

    time     ours is t = 1 at noise; theirs runs the other way, so the embedding is of 1 - t
    sign     ours is the velocity z - x; theirs is x - z, so the output is negated (whatever `predict` says)
    tokens   ours are packed (channel, row, column) as FLUX's; theirs (row, column, channel). Nothing to
             compute: the table of names permutes the columns of `image_in` and the rows of `out`

Each stream is filled up to a multiple of 32 tokens with a learned pad token, which is attended to like any
other. Positions: condition token i, pads included, sits at (i + 1, 0, 0); image tokens at (first frame, row,
column), where the first frame is 1 + the condition's padded length; image pads at (0, 0, 0).

A row's condition tokens that do not count (`attend_BT`) are taken out before the padding, as if the row were
shorter. Since rows then differ in their padded length, what lies behind it is masked, and image positions are
a row's own.

B samples, L image tokens, T condition tokens, S = L + T after padding, D hidden channels, E condition
channels, M modulation channels, C numbers in a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import GeneratorConfig
from iomm.model.layers import QueryKeyNorm, attention, split_heads, timestep_embedding, zero_init
from iomm.model.rope import Rope, rope, rotate
from iomm.parallel.backend import Layers

PAD_MULTIPLE = 32  # tokens of a stream are filled up to a multiple of this
NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
TIME_HIDDEN = 1024
MODULATION_CHANNELS = 256  # at most; a narrower model has its own width
PAD_INIT_STD = 0.02


def padded(tokens: int) -> int:
    """The multiple of 32 at or above."""
    return tokens + -tokens % PAD_MULTIPLE


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


class TimeEmbedding(nn.Module):
    """t (B,) in [0, 1], 1 = noise -> (B, M). Not activated: the blocks' modulation reads it as it is."""

    FREQUENCIES = 256

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.first = layers.replicated(self.FREQUENCIES, TIME_HIDDEN)
        self.second = layers.replicated(TIME_HIDDEN, channels)

    def forward(self, t_B: Tensor) -> Tensor:
        embedded = timestep_embedding(1 - t_B, self.FREQUENCIES).to(self.first.weight.dtype)
        return self.second(functional.silu(self.first(embedded)))


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
        self.head_size = d // config.heads
        self.qkv = layers.column(d, 3 * d, bias=False)
        self.norm = QueryKeyNorm(layers, self.head_size, eps=NORM_EPS)
        self.attention_out = layers.row(d, d, bias=False)
        self.mlp = SwiGlu(layers, d)
        self.attention_norm_in = RmsNorm(layers, d, affine=config.norm_affine)
        self.attention_norm_out = RmsNorm(layers, d, affine=config.norm_affine)
        self.mlp_norm_in = RmsNorm(layers, d, affine=config.norm_affine)
        self.mlp_norm_out = RmsNorm(layers, d, affine=config.norm_affine)
        channels = min(d, MODULATION_CHANNELS)
        self.modulation = zero_init(layers.replicated(channels, 4 * d)) if modulated else None

    def forward(self, s_SBD: Tensor, time_BM: Tensor, rope_: Rope, attend_BS: Tensor | None) -> Tensor:
        scale_attention = gate_attention = scale_mlp = gate_mlp = None
        if self.modulation is not None:
            scale_attention, gate_attention, scale_mlp, gate_mlp = self.modulation(time_BM).chunk(4, dim=-1)
        h = _scaled(self.attention_norm_in(s_SBD), scale_attention)
        q, k, v = split_heads(self.qkv(h), self.head_size)
        q, k = self.norm(q, k)
        attended = self.attention_out(attention(rotate(q, rope_), rotate(k, rope_), v, attend_BS))
        s_SBD = s_SBD + _gated(self.attention_norm_out(attended), gate_attention)
        mlp = self.mlp(_scaled(self.mlp_norm_in(s_SBD), scale_mlp))
        return s_SBD + _gated(self.mlp_norm_out(mlp), gate_mlp)


def _scaled(x_SBD: Tensor, scale_BD: Tensor | None) -> Tensor:
    return x_SBD if scale_BD is None else x_SBD * (1 + scale_BD)


def _gated(x_SBD: Tensor, gate_BD: Tensor | None) -> Tensor:
    return x_SBD if gate_BD is None else x_SBD * gate_BD.tanh()


class _Lengths(NamedTuple):
    """Condition tokens of a batch: T with pads; how many a row holds, without and with pads (None: all T)."""

    padded_T: int
    counts_B: Tensor | None
    padded_B: Tensor | None


class SingleStreamDiT(nn.Module):
    """The whole generator; the same call as `MMDiT`. Its output means what `config.predict` says."""

    def __init__(self, config: GeneratorConfig, layers: Layers) -> None:
        super().__init__()
        self.config = config
        d, channels = config.hidden_size, min(config.hidden_size, MODULATION_CHANNELS)
        self.image_in = layers.replicated(config.token_channels, d)
        self.condition_norm = RmsNorm(layers, config.condition_width)
        self.condition_in = layers.replicated(config.condition_width, d)
        self.time = TimeEmbedding(layers, channels)
        self.image_pad = _pad_token(layers, d)
        self.condition_pad = _pad_token(layers, d)
        self.noise_refiner, self.context_refiner, self.single_blocks = (
            nn.ModuleList(Block(layers, config, modulated=modulated) for _ in range(count))
            for count, modulated in (
                (config.refiner_blocks, True),
                (config.refiner_blocks, False),
                (config.single_blocks, True),
            )
        )
        self.out_modulation = zero_init(layers.replicated(channels, d))
        self.out = zero_init(layers.replicated(d, config.token_channels))

    def forward(
        self,
        x_t_BLC: Tensor,
        t_B: Tensor,
        condition_BTE: Tensor,
        positions_L3: Tensor,
        attend_BT: Tensor | None = None,
    ) -> Tensor:
        """Predict for noisy tokens.

        Args:
            x_t_BLC: noisy latent tokens.
            t_B: timesteps in [0, 1], 1 = noise.
            condition_BTE: condition tokens.
            positions_L3: (frame, row, column) of each image token; frames count from 0.
            attend_BT: True where a condition token counts; None: all do.
        Returns:
            (B, L, C), velocity or clean latent.
        """
        dtype, image_tokens = self.image_in.weight.dtype, x_t_BLC.shape[1]
        time_BM = self.time(t_B)
        condition_BTE, lengths = _compact(condition_BTE, attend_BT)
        x_LBD = _pad(self.image_in(x_t_BLC.to(dtype).transpose(0, 1)), self.image_pad, None)
        c_TBD = self.condition_in(self.condition_norm(condition_BTE.to(dtype).transpose(0, 1)))
        c_TBD = _pad(c_TBD, self.condition_pad, lengths.counts_B)
        positions = _positions(positions_L3, x_LBD.shape[0], lengths)
        rope_ = rope(positions, self.config.rope_axes, self.config.rope_theta, dtype)
        length = x_LBD.shape[0]
        x_rope, c_rope = (rope_[0][:length], rope_[1][:length]), (rope_[0][length:], rope_[1][length:])
        attend_BT, attend_BS = None, None
        if lengths.padded_B is not None:
            attend_BT = torch.arange(lengths.padded_T, device=x_LBD.device) < lengths.padded_B[:, None]
            attend_BS = functional.pad(attend_BT, (length, 0), value=True)
        for block in self.noise_refiner:
            x_LBD = block(x_LBD, time_BM, x_rope, None)
        for block in self.context_refiner:
            c_TBD = block(c_TBD, time_BM, c_rope, attend_BT)
        s_SBD = torch.cat((x_LBD, c_TBD))
        for block in self.single_blocks:
            s_SBD = block(s_SBD, time_BM, rope_, attend_BS)
        h_LBD = functional.layer_norm(s_SBD[:image_tokens], s_SBD.shape[-1:], eps=FINAL_NORM_EPS)
        h_LBD = _scaled(h_LBD, self.out_modulation(functional.silu(time_BM)))
        return -self.out(h_LBD).transpose(0, 1)


def _pad_token(layers: Layers, channels: int) -> nn.Parameter:
    token = nn.Parameter(torch.empty(1, channels, dtype=layers.config.params_dtype))
    token.init_std = PAD_INIT_STD  # type: ignore[attr-defined]
    return token


def _compact(condition_BTE: Tensor, attend_BT: Tensor | None) -> tuple[Tensor, _Lengths]:
    """Move each row's tokens that count to the front, in their order."""
    length = padded(condition_BTE.shape[1])
    if attend_BT is None:
        return condition_BTE, _Lengths(length, None, None)
    order_BT = (~attend_BT).to(torch.uint8).argsort(dim=1, stable=True)
    condition_BTE = condition_BTE.gather(1, order_BT[..., None].expand_as(condition_BTE))
    counts_B = attend_BT.sum(1)
    return condition_BTE, _Lengths(length, counts_B, counts_B + -counts_B % PAD_MULTIPLE)


def _pad(x_LBD: Tensor, token_1D: Tensor, counts_B: Tensor | None) -> Tensor:
    """Fill up to a multiple of 32 with the pad token, which also replaces what lies behind a row's count.

    The token enters by `where` even if nothing is to be filled, so that its gradient always exists: the
    overlapped reduction of gradients waits for every trained parameter.
    """
    tokens = x_LBD.shape[0]
    x_LBD = functional.pad(x_LBD, (0, 0, 0, 0, 0, -tokens % PAD_MULTIPLE))
    index_L1 = torch.arange(x_LBD.shape[0], device=x_LBD.device)[:, None]
    pad_LB = index_L1 >= (tokens if counts_B is None else counts_B)
    return torch.where(pad_LB[..., None], token_1D, x_LBD)


def _positions(positions_L3: Tensor, padded_L: int, lengths: _Lengths) -> Tensor:
    """Rotary positions of [image | condition]: (S, 3), or (S, B, 3) where rows differ."""
    device, pads = positions_L3.device, padded_L - positions_L3.shape[0]
    condition_T3 = functional.pad(torch.arange(1, lengths.padded_T + 1, device=device)[:, None], (0, 2))
    if lengths.padded_B is None:
        image_L3 = positions_L3 + functional.pad(torch.tensor([lengths.padded_T + 1], device=device), (0, 2))
        return torch.cat((functional.pad(image_L3, (0, 0, 0, pads)), condition_T3))
    first_B3 = functional.pad(lengths.padded_B[:, None] + 1, (0, 2))
    image_LB3 = functional.pad(positions_L3[:, None] + first_B3, (0, 0, 0, 0, 0, pads))
    return torch.cat((image_LB3, condition_T3[:, None].expand(-1, first_B3.shape[0], -1)))
