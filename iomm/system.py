"""The whole generator as one thing: the trained part, its loss, and what is done with it.

    Encoders  frozen: autoencoder, MLLM, feature cache (encoders.py)         never in a checkpoint
    System    trained: conditioner (adapter, connector) and generator        the checkpoint's weights

A rank holds the part of the system that its place in the pipeline asks for, under names that do not depend on
the layout. B samples, L latent tokens of C numbers, T condition tokens of E channels, S positions of a packed
sequence, D hidden channels.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iomm.conditioning.conditioner import Conditioner
from iomm.conditioning.mllm import FrozenMllm
from iomm.conditioning.prefix import Prefix
from iomm.config import Config
from iomm.encoders import Encoded, Encoders, Shapes
from iomm.flow.path import Grid, Prediction, grid_positions, to_velocity
from iomm.flow.timesteps import training_timesteps
from iomm.model.flops import block_costs, first_cost, last_cost
from iomm.model.init import initialize
from iomm.model.mmdit import MMDiT, unvaried_inputs
from iomm.model.single_stream import SingleStreamDiT
from iomm.parallel.backend import Layers, kernel_provider, transformer_config
from iomm.parallel.engine import DTYPES
from iomm.parallel.fp8 import fp8_region, use_fp8
from iomm.parallel.mesh import Mesh
from iomm.parallel.relay import Pass, Relay
from iomm.parallel.stages import Chunk, chunks_of, split, whole
from iomm.random import Stream
from iomm_kernels.flow_noise import flow_noise
from iomm_kernels.velocity_mse import velocity_mse

FAMILIES = {"flux": MMDiT, "z_image": SingleStreamDiT}
Condition = tuple[Tensor, Tensor | None]  # condition_BTE, attend_BT (None: every token counts)


@dataclass
class MicroBatch:
    """What one micro-batch needs on this rank."""

    index_B: Tensor  # global sample indices: noise, timestep, mask and null are functions of them
    latent_BLC: Tensor  # clean, normalised
    grid: Grid  # of its L tokens
    condition_tokens: int  # T
    attend_BT: Tensor | None = None  # True where a condition token counts; None: all do
    prefix: Prefix | None = None  # on ranks that compute the condition within the pipeline
    condition_BTE: Tensor | None = None  # on ranks that get it from elsewhere


class Chunked(nn.Module):
    """The weights of one pipeline chunk, as Megatron's data parallelism wants them: a module a chunk."""

    def __init__(self, chunk: Chunk, system: "System") -> None:
        super().__init__()
        self.chunk = chunk
        if chunk.first and not system.shares_encoders:
            self.conditioner = system.conditioner
        for name, part in system.generator.members(chunk).items():
            setattr(self, name, part)  # a module or a parameter: torch registers either


class System(nn.Module):
    """Everything that is trained, or this rank's part of it.

    Args:
        config: of the run.
        shapes: of the frozen encoders.
        mesh: where this rank stands.
        stages: this rank's chunks of the pipeline; None: the whole generator.

    `conditioner` is None on ranks that have none. `shared` is the conditioner if it is trained by all ranks
    of the model-parallel group together (`parallel.encoders = shared`), else it belongs to the first chunk.
    """

    def __init__(
        self, config: Config, shapes: Shapes, mesh: Mesh, stages: Sequence[Chunk] | None = None
    ) -> None:
        super().__init__()
        generator, dtype = config.generator, DTYPES[config.train.precision]
        self.config, self.shapes, self.mesh = config, shapes, mesh
        self.predict: Prediction = generator.predict
        self.backend_config = transformer_config(
            generator.hidden_size, generator.heads, dtype, mesh, config.parallel
        )
        self.kernels = kernel_provider(config.kernels, mesh.device, dtype)
        layers = Layers(self.backend_config, mesh, self.kernels)
        self.generator = FAMILIES[generator.family](generator, layers, stages)
        blocks = generator.double_blocks + generator.single_blocks
        self.stages: tuple[Chunk, ...] = (whole(blocks),) if stages is None else tuple(stages)
        # Dealt to all ranks of the model-parallel group, the conditioner is trained outside the pipeline.
        self.shares_encoders = config.parallel.encoders == "shared" and mesh.mp_size > 1
        self.conditioner = None
        if self.shares_encoders or self.stages[0].first:
            self.conditioner = Conditioner(
                config.condition, shapes.mllm_width, generator.condition_width, dtype
            )
        if self.shares_encoders and self.conditioner is not None:
            for parameter in self.conditioner.parameters():
                parameter.shared_by_all = True  # type: ignore[attr-defined]
        elif mesh.tp_size > 1 and self.conditioner is not None:
            for parameter in self.conditioner.parameters():
                parameter.copied_over_tp = True  # type: ignore[attr-defined]
        self._relay = Relay(mesh, dtype) if mesh.pp_size > 1 else None
        self._chunks = [Chunked(chunk, self) for chunk in self.stages]
        self._fp8 = fp8_region(config.fp8, self.backend_config, mesh)
        self.on_pass: Callable[[], None] = lambda: None  # told of every forward pass that begins

    @property
    def shared(self) -> nn.Module | None:
        """The conditioner, if all ranks of the model-parallel group train it together."""
        return self.conditioner if self.shares_encoders else None

    @property
    def chunks(self) -> list[Chunked]:
        """The weights of each of this rank's pipeline chunks."""
        return self._chunks

    def check_sizes(self, sizes_px: Sequence[tuple[int, int]]) -> None:
        """That images of each (height, width) can be trained on, so that no later step finds one that cannot.

        Raises:
            ValueError: one is not made of whole latent tokens, or sequence parallelism cannot split them.
        """
        for height_px, width_px in sizes_px:
            try:
                if height_px % self.shapes.token_px or width_px % self.shapes.token_px:
                    raise ValueError(f"latent tokens are {self.shapes.token_px} px a side. Choose multiples.")
                tokens = height_px * width_px // self.shapes.token_px**2
                self.generator.packed_length(tokens, self.config.condition.queries)
            except ValueError as error:
                raise ValueError(f"training images of {height_px} x {width_px} px: {error}") from error

    def condition(self, mllm: FrozenMllm, prefix: Prefix) -> Condition:
        """Condition tokens of a prefix; on ranks that hold the conditioner."""
        assert self.conditioner is not None
        return self.conditioner(mllm, prefix)

    def advance(
        self, chunk: Chunk, carried_SBD: Tensor | None, item: MicroBatch, mllm: FrozenMllm | None
    ) -> Tensor:
        """One chunk's share of a training pass.

        Args:
            chunk: one of `stages`.
            carried_SBD: what the chunk before returned; None for the first.
            item: the micro-batch.
            mllm: where the condition is computed here.
        Returns:
            what the next chunk needs, or behind the last one the velocity loss of each sample, (B,), fp32 or
            better.
        """
        seed, x_BLC = self.config.train.seed, item.latent_BLC
        t_B = x_t_BLC = target_BLC = None
        if chunk.first or chunk.last:  # drawn again where needed: the draws are functions of the sample index
            index_B = item.index_B.to(x_BLC.device)
            t_B = training_timesteps(self.config.flow, seed, index_B)
            x_t_BLC, target_BLC = flow_noise(x_BLC, t_B, index_B, seed, Stream.NOISE, provider=self.kernels)
        what, out = Pass(item.grid, item.condition_tokens, item.attend_BT), carried_SBD
        if chunk.first:
            assert x_t_BLC is not None and t_B is not None
            if item.prefix is not None and mllm is not None:
                condition = self.condition(mllm, item.prefix)
            else:
                assert item.condition_BTE is not None
                condition = item.condition_BTE, item.attend_BT
            out = self._first(x_t_BLC, t_B, condition, item.grid)
        else:
            assert carried_SBD is not None
            out = self._next(chunk, carried_SBD, what)
        if not chunk.last:
            return out
        assert t_B is not None and x_t_BLC is not None and target_BLC is not None
        velocity_BLC = self._to_velocity(out, x_t_BLC, t_B)
        return velocity_mse(velocity_BLC, target_BLC, provider=self.kernels)

    def velocity(
        self, x_t_BLC: Tensor, t_B: Tensor, condition: Condition, grid: Grid | None = None
    ) -> Tensor:
        """The network's velocity at x_t, whatever it predicts; in the dtype of x_t or fp32, the wider.

        With pipeline stages it is called on stage 0, inside `conducting`, while the others `serve`.

        Args:
            grid: of the L tokens; None: that of images of data.image_px.
        """
        grid = grid or self.shapes.grid
        out = self._first(x_t_BLC, t_B, condition, grid)
        if self._relay is not None:
            what = Pass(grid, condition[0].shape[1], condition[1])
            self._relay.announce(what)
            self._pass_on(self._relay, out, what)
            out = self._relay.receive(self.mesh.pp_size - 1)
        return self._to_velocity(out, x_t_BLC, t_B)

    @contextlib.contextmanager
    def conducting(self) -> Iterator[bool]:
        """Evaluation and sampling with a pipeline: yields True on stage 0, whose `velocity` may be called
        inside; the other stages serve it until it leaves, and get False."""
        if self._relay is None:
            yield True
        elif self.mesh.is_first_stage:
            try:
                yield True
            finally:
                self._relay.announce(None)
        else:
            while (what := self._relay.await_pass()) is not None:
                self._pass_on(self._relay, None, what)
            yield False

    @torch.no_grad()
    def _pass_on(self, relay: Relay, first_SBD: Tensor | None, what: Pass) -> None:
        """Run this rank's chunks in the order of the pipeline (the first of all has run); the last one
        answers stage 0."""
        stage, last = self.mesh.pp_rank, self.mesh.pp_size - 1
        for chunk in self.stages:
            if chunk.first:
                assert first_SBD is not None
                out = first_SBD
            else:
                out = self._next(chunk, relay.receive((stage - 1) % self.mesh.pp_size), what)
            relay.send(out, 0 if stage == last else stage + 1)

    def _first(self, x_t_BLC: Tensor, t_B: Tensor, condition: Condition, grid: Grid) -> Tensor:
        """The first chunk: what it carries on, or of a whole generator the output (B, L, C)."""
        self.on_pass()
        condition_BTE, attend_BT = condition
        constants = unvaried_inputs(self.config.generator, len(t_B), t_B.device)
        inputs = x_t_BLC, t_B, condition_BTE, grid_positions(*grid, t_B.device), attend_BT
        with self._fp8():
            if self.stages[0].last:
                return self.generator(*inputs, **constants)
            carried_SBD = self.generator.enter(*inputs, **constants)
            return self._next(self.stages[0], carried_SBD, Pass(grid, condition_BTE.shape[1], attend_BT))

    def _next(self, chunk: Chunk, carried_SBD: Tensor, what: Pass) -> Tensor:
        """The blocks of a chunk; behind the last one the generator's output (B, L, C)."""
        self.on_pass()
        positions_L3 = grid_positions(*what.grid, carried_SBD.device)
        with self._fp8():
            out = self.generator.run(carried_SBD, chunk, positions_L3, what.condition_tokens, what.attend_BT)
            return self.generator.leave(out, len(positions_L3)) if chunk.last else out

    def _to_velocity(self, out_BLC: Tensor, x_t_BLC: Tensor, t_B: Tensor) -> Tensor:
        return to_velocity(
            out_BLC.to(x_t_BLC.dtype), x_t_BLC, t_B, self.predict, self.config.flow.min_timestep
        )


def condition_tokens(config: Config, shapes: Shapes) -> int:
    """Condition tokens of an image sample, at most: the auxiliary prompt not counted."""
    queries = config.condition.queries
    return queries if config.condition.condition_tokens == "queries" else shapes.patch_tokens + queries


def plan_stages(
    config: Config, shapes: Shapes, pp_rank: int, condition_flops: float = 0.0
) -> tuple[Chunk, ...] | None:
    """The chunks of one pipeline rank, so that the most expensive chunk is as cheap as it can be by FLOPs.

    Args:
        condition_flops: what the first chunk spends on the condition, as forward FLOPs of one image.
    Raises:
        ValueError: more chunks than blocks.
    """
    parallel, tokens = config.parallel, (shapes.latent_tokens, condition_tokens(config, shapes))
    if parallel.pp == 1:
        return None
    costs = block_costs(config.generator, *tokens)
    first = first_cost(config.generator, *tokens) + condition_flops
    last = last_cost(config.generator, *tokens)
    ranges = split(costs, parallel.pp * parallel.virtual_stages, first_cost=first, last_cost=last)
    return chunks_of(ranges, pp_rank, parallel.pp)


@dataclass(frozen=True)
class ConditionFlops:
    """Forward FLOPs of one image sample's condition."""

    prefix: int
    adapter: int
    queries: int  # the query rows' pass through the MLLM
    connector: int

    @property
    def trained(self) -> int:
        """Forward and backward of what carries gradients: the MLLM's weights get none, so its backward pass
        costs as much as its forward pass, the others' twice as much."""
        return 3 * self.adapter + 2 * self.queries + 3 * self.connector


@torch.no_grad()
def count_condition_flops(conditioner: Conditioner, encoders: Encoders) -> ConditionFlops:
    """Counts the operators of one blank image sample's condition."""
    mllm = encoders.mllm
    patches_1NF = torch.zeros(1, mllm.image_tokens, mllm.width, dtype=mllm.dtype, device=mllm.device)
    keep_1N = torch.ones(patches_1NF.shape[:2], dtype=torch.bool)
    prefix = encoders.prefixes.for_images(patches_1NF, keep_1N)

    def count[T](call: Callable[[], T]) -> tuple[int, T]:
        with FlopCounterMode(display=False) as counter:
            out = call()
        return counter.get_total_flops(), out

    in_prefix, encoded = count(lambda: mllm.encode_prefix(prefix))
    in_adapter = in_queries = 0
    adapter = conditioner.adapter
    if adapter is not None:
        in_adapter, queries = count(lambda: adapter(*prefix.read))
        in_queries, _ = count(lambda: mllm.run_queries(queries, encoded))
    states, attend = conditioner.states(mllm, prefix), conditioner.attend(prefix)
    in_connector, _ = count(lambda: conditioner.connector(states, attend))
    return ConditionFlops(in_prefix, in_adapter, in_queries, in_connector)


def build(config: Config, shapes: Shapes, mesh: Mesh, encoders: Encoders | None = None) -> System:
    """This rank's part of what is trained, with its initial weights, on the mesh's device.

    Args:
        encoders: on ranks that have them; a pipeline's first stage gets fewer blocks for the condition that
            it computes.
    """
    share = 0.0
    if mesh.pp_size > 1 and config.parallel.encoders == "first_stage":
        if encoders is not None and mesh.rank == 0:
            width, dtype = config.generator.condition_width, encoders.mllm.dtype
            conditioner = Conditioner(config.condition, shapes.mllm_width, width, dtype).to(mesh.device)
            share = count_condition_flops(conditioner, encoders).trained / 3
        share = mesh.broadcast_object(share)
    system = System(config, shapes, mesh, plan_stages(config, shapes, mesh.pp_rank, share))
    initialize(system, config.train.seed, mesh.tp_rank, mesh.tp_size)
    use_fp8(system.to(mesh.device), config.fp8)
    return system


def micro_batch(system: System, encoders: Encoders, item: Encoded) -> MicroBatch:
    """A batch of samples as a rank with encoders and conditioner trains on it."""
    index_B, seed = item.batch.index_B, system.config.train.seed
    prefix = encoders.prefixes.for_training(item.batch.captions, item.patches_BNF, seed, index_B)
    assert system.conditioner is not None
    attend_BT = system.conditioner.attend(prefix)
    tokens = system.config.condition.queries if attend_BT is None else attend_BT.shape[1]
    latent_BLC = encoders.training_latent(item, seed)
    return MicroBatch(index_B, latent_BLC, item.grid, tokens, attend_BT, prefix)


def training_loss(system: System, encoders: Encoders, item: Encoded) -> Tensor:
    """Loss of each sample of a training batch by a whole system; every draw is a function of (seed, global
    sample index)."""
    return system.advance(system.stages[0], None, micro_batch(system, encoders, item), encoders.mllm)
