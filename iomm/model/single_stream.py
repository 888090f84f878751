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

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import GeneratorConfig
from iomm.model.blocks_z_image import Block, RmsNorm, modulation_channels, scaled
from iomm.model.layers import timestep_embedding, zero_init
from iomm.model.packed import Geometry, joint_order, local_length, local_slice, pack, unpack
from iomm.model.padding import compact, fill, lengths, padded, positions
from iomm.model.recompute import run_block
from iomm.model.rope import rope
from iomm.parallel.backend import Layers
from iomm.parallel.stages import Chunk, whole

FINAL_NORM_EPS = 1e-6
TIME_HIDDEN = 1024
PAD_INIT_STD = 0.02
_BEFORE_BLOCKS = (
    "image_in",
    "condition_norm",
    "condition_in",
    "time",
    "image_pad",
    "condition_pad",
    "noise_refiner",
    "context_refiner",
)
_BEHIND_BLOCKS = ("out_modulation", "out")


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


class SingleStreamDiT(nn.Module):
    """The generator, or the chunks of it that a pipeline rank holds; the same calls as `MMDiT`. Its output
    means what `config.predict` says.

    Packed streams are in the order [image | condition]. The refiners belong to the first chunk.
    """

    def __init__(
        self, config: GeneratorConfig, layers: Layers, chunks: Sequence[Chunk] | None = None
    ) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        d = config.hidden_size
        self.time_channels = modulation_channels(d)
        self.whole = whole(config.single_blocks)
        chunks = (self.whole,) if chunks is None else chunks

        def blocks(numbers: Iterable[int], *, modulated: bool = True) -> nn.ModuleDict:
            return nn.ModuleDict({str(i): Block(layers, config, modulated=modulated) for i in numbers})

        if any(chunk.first for chunk in chunks):
            self.image_in = layers.replicated(config.token_channels, d)
            self.condition_norm = RmsNorm(layers, config.condition_width)
            self.condition_in = layers.replicated(config.condition_width, d)
            self.time = TimeEmbedding(layers, self.time_channels)
            self.image_pad = _pad_token(layers, d)
            self.condition_pad = _pad_token(layers, d)
            self.noise_refiner = blocks(range(config.refiner_blocks))
            self.context_refiner = blocks(range(config.refiner_blocks), modulated=False)
        self.single_blocks = blocks(i for chunk in chunks for i in chunk.blocks)  # by number in the model
        if any(chunk.last for chunk in chunks):
            self.out_modulation = zero_init(layers.replicated(self.time_channels, d))
            self.out = zero_init(layers.replicated(d, config.token_channels))
        layers.mark_partial_gradients(self)

    def forward(
        self,
        x_t_BLC: Tensor,
        t_B: Tensor,
        condition_BTE: Tensor,
        positions_L3: Tensor,
        attend_BT: Tensor | None = None,
    ) -> Tensor:
        """Predict for noisy tokens; the whole model.

        Args:
            x_t_BLC: noisy latent tokens.
            t_B: timesteps in [0, 1], 1 = noise.
            condition_BTE: condition tokens.
            positions_L3: (frame, row, column) of each image token; frames count from 0.
            attend_BT: True where a condition token counts; None: all do.
        Returns:
            (B, L, C), velocity or clean latent.
        Raises:
            ValueError: with sequence parallelism, padded image tokens that do not divide over the ranks.
        """
        geometry = self._geometry(positions_L3, condition_BTE.shape[1], attend_BT, len(t_B))
        time_BM, x_LBD, c_TBD = self._embed(x_t_BLC, t_B, condition_BTE, attend_BT, geometry)
        s_SBD = self._run(self.whole, time_BM, torch.cat((x_LBD, c_TBD)), geometry)
        return self._predict(time_BM, s_SBD, x_t_BLC.shape[1])

    def enter(
        self,
        x_t_BLC: Tensor,
        t_B: Tensor,
        condition_BTE: Tensor,
        positions_L3: Tensor,
        attend_BT: Tensor | None = None,
    ) -> Tensor:
        """First chunk: embed and refine the inputs (as in `forward`) -> packed (S, B, D)."""
        geometry = self._geometry(positions_L3, condition_BTE.shape[1], attend_BT, len(t_B))
        return pack(*self._embed(x_t_BLC, t_B, condition_BTE, attend_BT, geometry))

    def run(
        self,
        packed_SBD: Tensor,
        chunk: Chunk,
        positions_L3: Tensor,
        condition_tokens: int,
        attend_BT: Tensor | None = None,
    ) -> Tensor:
        """The blocks of one chunk: packed -> packed."""
        time_BM, s_SBD = unpack(packed_SBD, self.time_channels, len(packed_SBD) - 1)
        geometry = self._geometry(positions_L3, condition_tokens, attend_BT, packed_SBD.shape[1])
        return pack(time_BM, self._run(chunk, time_BM, s_SBD, geometry))

    def leave(self, packed_SBD: Tensor, image_tokens: int) -> Tensor:
        """Last chunk: packed -> (B, L, C), the same on all tensor-parallel ranks."""
        time_BM, s_SBD = unpack(packed_SBD, self.time_channels, len(packed_SBD) - 1)
        return self._predict(time_BM, s_SBD, image_tokens)

    def packed_length(self, image_tokens: int, condition_tokens: int) -> int:
        """Rows S of the packed tensor on this rank."""
        return 1 + self._image_length(image_tokens) + self._condition_length(condition_tokens)

    def members(self, chunk: Chunk) -> dict[str, nn.Module | nn.Parameter]:
        """What belongs to one chunk, under the names it has here."""
        blocks = {str(i): self.single_blocks[str(i)] for i in chunk.blocks}
        names = (_BEFORE_BLOCKS if chunk.first else ()) + (_BEHIND_BLOCKS if chunk.last else ())
        members: dict[str, nn.Module | nn.Parameter] = {"single_blocks": nn.ModuleDict(blocks)}
        return members | {name: getattr(self, name) for name in names}

    def _image_length(self, image_tokens: int) -> int:
        return local_length(padded(image_tokens), self.layers.sequence_ranks, "padded image")

    def _condition_length(self, condition_tokens: int) -> int:
        return -(-padded(condition_tokens) // self.layers.sequence_ranks)

    def _embed(
        self,
        x_t_BLC: Tensor,
        t_B: Tensor,
        condition_BTE: Tensor,
        attend_BT: Tensor | None,
        geometry: Geometry,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Time (B, M), and both streams behind their refiners: this rank's slices."""
        image_tokens, condition_tokens = x_t_BLC.shape[1], condition_BTE.shape[1]
        time_BM, rank = self.time(t_B), self.layers.sequence_rank
        x_LBD = self.image_in(local_slice(self.layers, x_t_BLC, self._image_length(image_tokens)))
        x_LBD = fill(x_LBD, self.image_pad, image_tokens, rank * len(x_LBD))
        c_TBE = compact(condition_BTE, attend_BT)
        c_TBE = local_slice(self.layers, c_TBE, self._condition_length(condition_tokens))
        c_TBD = self.condition_in(self.condition_norm(c_TBE))
        counts_B = condition_tokens if attend_BT is None else attend_BT.sum(1)
        c_TBD = fill(c_TBD, self.condition_pad, counts_B, rank * len(c_TBD))

        split = len(x_LBD) * self.layers.sequence_ranks
        cos, sin = geometry.rope_
        attend_BS = geometry.attend_BS
        attend_BT = None if attend_BS is None else attend_BS[:, split:]
        for block in self.noise_refiner.values():
            x_LBD = run_block(self.layers, block, x_LBD, time_BM, (cos[:split], sin[:split]), None)
        for block in self.context_refiner.values():
            c_TBD = run_block(self.layers, block, c_TBD, time_BM, (cos[split:], sin[split:]), attend_BT)
        return time_BM, x_LBD, c_TBD

    def _geometry(
        self, positions_L3: Tensor, condition_tokens: int, attend_BT: Tensor | None, samples: int
    ) -> Geometry:
        ranks, device = self.layers.sequence_ranks, positions_L3.device
        image_L = self._image_length(len(positions_L3)) * ranks
        total_T = self._condition_length(condition_tokens) * ranks
        condition = lengths(condition_tokens, attend_BT, samples, total_T, device)
        places = positions(positions_L3, image_L, condition)
        rope_ = rope(places, self.config.rope_axes, self.config.rope_theta, self.layers.config.params_dtype)
        attend_BS = None
        if condition.padded_B is not None:
            attend_BT = torch.arange(total_T, device=device) < condition.padded_B[:, None]
            attend_BS = functional.pad(attend_BT, (image_L, 0), value=True)
        return Geometry(rope_, attend_BS, joint_order(image_L, total_T, ranks, device))

    def _run(self, chunk: Chunk, time_BM: Tensor, s_SBD: Tensor, geometry: Geometry) -> Tensor:
        """The joint stream behind the blocks of a chunk."""
        rope_, attend_BS = geometry.joint()
        for i in chunk.blocks:
            s_SBD = run_block(self.layers, self.single_blocks[str(i)], s_SBD, time_BM, rope_, attend_BS)
        return s_SBD

    def _predict(self, time_BM: Tensor, s_SBD: Tensor, image_tokens: int) -> Tensor:
        """The image comes first; of its pads only those are computed that other ranks' slices ask for."""
        split = self.layers.sequence_ranks > 1
        x_LBD = s_SBD[: self._image_length(image_tokens) if split else image_tokens]
        h_LBD = functional.layer_norm(x_LBD, x_LBD.shape[-1:], eps=FINAL_NORM_EPS)
        h_LBD = scaled(h_LBD, self.out_modulation(functional.silu(time_BM)))
        return -self.layers.gather(self.out(h_LBD))[:image_tokens].transpose(0, 1)


def _pad_token(layers: Layers, channels: int) -> nn.Parameter:
    token = nn.Parameter(torch.empty(1, channels, dtype=layers.config.params_dtype))
    token.init_std = PAD_INIT_STD  # type: ignore[attr-defined]
    return token
