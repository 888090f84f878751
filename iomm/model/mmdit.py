"""The generator: a multimodal diffusion transformer of the FLUX family (MM-DiT, arXiv 2403.03206; METHOD.md
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

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from iomm.config import GeneratorConfig
from iomm.model.blocks_flux import DoubleBlock, SingleBlock
from iomm.model.layers import NORM_EPS, Modulation, VectorEmbedding, timestep_embedding, zero_init
from iomm.model.packed import Geometry, joint_order, local_length, local_slice, pack, unpack
from iomm.model.recompute import run_block
from iomm.model.rope import rope
from iomm.parallel.backend import Layers
from iomm.parallel.stages import Chunk, whole
from iomm_kernels.modulate import modulate

SINUSOIDS = 256  # numbers that a timestep or a guidance scale is spread into


class MMDiT(nn.Module):
    """The generator, or the chunks of it that a pipeline rank holds. Its output means what `config.predict`
    says.

    The whole model is called as one (`forward`). In a pipeline the first chunk calls `enter` and `run`, those
    behind it `run`, the last one `run` and `leave`; between them goes one tensor (`iomm.model.packed`, the
    streams in the order [condition | image]).
    """

    def __init__(
        self, config: GeneratorConfig, layers: Layers, chunks: Sequence[Chunk] | None = None
    ) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        d, doubles = config.hidden_size, config.double_blocks
        self.whole = whole(doubles + config.single_blocks)
        chunks = (self.whole,) if chunks is None else chunks
        if any(chunk.first for chunk in chunks):
            self.image_in = layers.replicated(config.token_channels, d)
            self.condition_in = layers.replicated(config.condition_width, d)
            self.time = VectorEmbedding(layers, SINUSOIDS, d)
            self.guidance = VectorEmbedding(layers, SINUSOIDS, d) if config.guidance_embedding else None
            pooled = config.pooled_width
            self.pooled = None if pooled is None else VectorEmbedding(layers, pooled, d)
        self.double_blocks, self.single_blocks = nn.ModuleDict(), nn.ModuleDict()  # by number in the model
        for i in (i for chunk in chunks for i in chunk.blocks):
            if i < doubles:
                last = config.single_blocks == 0 and i == doubles - 1
                self.double_blocks[str(i)] = DoubleBlock(layers, config, last=last)
            else:
                self.single_blocks[str(i - doubles)] = SingleBlock(layers, config)
        if any(chunk.last for chunk in chunks):
            self.out_modulation = Modulation(layers, d, 2)
            self.out = zero_init(layers.replicated(d, config.token_channels))
        layers.mark_partial_gradients(self)

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
        """Predict for noisy tokens; the whole model.

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
            ValueError: an input that the model was not built for, or one that is missing; with sequence
                parallelism, image tokens that do not divide over the ranks.
        """
        time_BD, c_TBD, x_LBD = self._embed(x_t_BLC, t_B, condition_BTE, pooled_BP, guidance_B)
        geometry = self._geometry(positions_L3, condition_BTE.shape[1], attend_BT, len(t_B))
        _, x_LBD = self._run(self.whole, time_BD, c_TBD, x_LBD, geometry)
        return self._predict(time_BD, x_LBD)

    def enter(
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
        """First chunk: embed the inputs (as in `forward`) -> packed (S, B, D)."""
        del positions_L3, attend_BT  # the other family's refiners need them
        return pack(*self._embed(x_t_BLC, t_B, condition_BTE, pooled_BP, guidance_B))

    def run(
        self,
        packed_SBD: Tensor,
        chunk: Chunk,
        positions_L3: Tensor,
        condition_tokens: int,
        attend_BT: Tensor | None = None,
    ) -> Tensor:
        """The blocks of one chunk: packed -> packed."""
        lengths = self._lengths(condition_tokens, len(positions_L3))
        time_BD, c_TBD, x_LBD = unpack(packed_SBD, packed_SBD.shape[-1], *lengths)
        geometry = self._geometry(positions_L3, condition_tokens, attend_BT, packed_SBD.shape[1])
        return pack(time_BD, *self._run(chunk, time_BD, c_TBD, x_LBD, geometry))

    def leave(self, packed_SBD: Tensor, image_tokens: int) -> Tensor:
        """Last chunk: packed -> (B, L, C), the same on all tensor-parallel ranks."""
        length = local_length(image_tokens, self.layers.sequence_ranks, "image")
        return self._predict(packed_SBD[0], packed_SBD[-length:])

    def packed_length(self, image_tokens: int, condition_tokens: int) -> int:
        """Rows S of the packed tensor on this rank."""
        return 1 + sum(self._lengths(condition_tokens, image_tokens))

    def members(self, chunk: Chunk) -> dict[str, nn.Module | nn.Parameter]:
        """What belongs to one chunk, under the names it has here."""
        doubles = self.config.double_blocks
        double = {str(i): self.double_blocks[str(i)] for i in chunk.blocks if i < doubles}
        single = {
            str(i - doubles): self.single_blocks[str(i - doubles)] for i in chunk.blocks if i >= doubles
        }
        members: dict[str, nn.Module | nn.Parameter] = {
            "double_blocks": nn.ModuleDict(double),
            "single_blocks": nn.ModuleDict(single),
        }
        first, last = ("image_in", "condition_in", "time", "guidance", "pooled"), ("out_modulation", "out")
        names = (first if chunk.first else ()) + (last if chunk.last else ())
        return members | {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _lengths(self, condition_tokens: int, image_tokens: int) -> tuple[int, int]:
        """A rank's condition tokens, filled up so that they divide, and its image tokens."""
        ranks = self.layers.sequence_ranks
        return -(-condition_tokens // ranks), local_length(image_tokens, ranks, "image")

    def _embed(
        self,
        x_t_BLC: Tensor,
        t_B: Tensor,
        condition_BTE: Tensor,
        pooled_BP: Tensor | None,
        guidance_B: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Time (B, D), condition stream, image stream; of the streams, this rank's slices."""
        c_length, x_length = self._lengths(condition_BTE.shape[1], x_t_BLC.shape[1])
        c_TBD = self.condition_in(local_slice(self.layers, condition_BTE, c_length))
        x_LBD = self.image_in(local_slice(self.layers, x_t_BLC, x_length))
        return self._steering(t_B, pooled_BP, guidance_B), c_TBD, x_LBD

    def _geometry(
        self, positions_L3: Tensor, condition_tokens: int, attend_BT: Tensor | None, samples: int
    ) -> Geometry:
        ranks, device = self.layers.sequence_ranks, positions_L3.device
        pads = -condition_tokens % ranks
        if pads and attend_BT is None:
            attend_BT = torch.ones(samples, condition_tokens, dtype=torch.bool, device=device)
        if attend_BT is not None:
            attend_BT = functional.pad(attend_BT, (0, pads), value=False)
        t, length = condition_tokens + pads, len(positions_L3)
        positions_S3 = torch.cat((positions_L3.new_zeros(t, 3), positions_L3))
        rope_ = rope(
            positions_S3, self.config.rope_axes, self.config.rope_theta, self.layers.config.params_dtype
        )
        attend_BS = None if attend_BT is None else functional.pad(attend_BT, (0, length), value=True)
        return Geometry(rope_, attend_BS, joint_order(t, length, ranks, device))

    def _run(
        self, chunk: Chunk, time_BD: Tensor, c_TBD: Tensor, x_LBD: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Both streams behind the blocks of a chunk."""
        doubles = self.config.double_blocks
        rope_, attend_BS, _ = geometry
        for i in chunk.blocks[: max(0, doubles - chunk.blocks.start)]:
            block = self.double_blocks[str(i)]
            c_TBD, x_LBD = run_block(self.layers, block, c_TBD, x_LBD, time_BD, rope_, attend_BS)
        singles = chunk.blocks[max(0, doubles - chunk.blocks.start) :]
        if singles:
            rope_, attend_BS = geometry.joint()
            s_SBD = torch.cat((c_TBD, x_LBD))
            for i in singles:
                block = self.single_blocks[str(i - doubles)]
                s_SBD = run_block(self.layers, block, s_SBD, time_BD, rope_, attend_BS)
            c_TBD, x_LBD = s_SBD.split((len(c_TBD), len(x_LBD)))
        return c_TBD, x_LBD

    def _predict(self, time_BD: Tensor, x_LBD: Tensor) -> Tensor:
        scale, shift = self.out_modulation(time_BD)
        h_LBD = modulate(x_LBD, shift, scale, eps=NORM_EPS, provider=self.layers.kernels)
        return self.layers.gather(self.out(h_LBD)).transpose(0, 1)

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
