"""Small generators of either family, whole and in chunks, and inputs for them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iomm.config import GeneratorConfig, ParallelConfig
from iomm.flow.path import grid_positions
from iomm.model.init import initialize
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.mesh import Mesh, start
from iomm.parallel.stages import Chunk, chunks_of, split
from iomm.system import FAMILIES

TOKEN_CHANNELS, CONDITION_WIDTH = 8, 12


FLUX = GeneratorConfig(
    hidden_size=32,
    heads=2,
    double_blocks=2,
    single_blocks=2,
    rope_axes=(4, 6, 6),
    token_channels=TOKEN_CHANNELS,
    condition_width=CONDITION_WIDTH,
)
Z_IMAGE = GeneratorConfig(
    family="z_image",
    hidden_size=32,
    heads=2,
    double_blocks=0,
    single_blocks=3,
    refiner_blocks=1,
    rope_axes=(4, 6, 6),
    rope_theta=256.0,
    token_channels=TOKEN_CHANNELS,
    condition_width=CONDITION_WIDTH,
)


def make(
    config: GeneratorConfig,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    parallel: ParallelConfig | None = None,
    mesh: Mesh | None = None,
    chunks: Sequence[Chunk] | None = None,
):
    """The family's model, or chunks of it, with its initial weights; uninitialised on the meta device."""
    parallel = parallel or ParallelConfig()
    mesh = mesh or start(parallel)
    layers = Layers(transformer_config(config.hidden_size, config.heads, dtype, mesh, parallel), mesh)
    model = FAMILIES[config.family](config, layers, chunks)
    if next(model.parameters()).device.type != "meta":
        initialize(model, seed, mesh.tp_rank, mesh.tp_size)
    return model


def stages(config: GeneratorConfig, pp: int, virtual: int) -> list[tuple[Chunk, ...]]:
    """The chunks of each pipeline rank."""
    ranges = split([1.0] * (config.double_blocks + config.single_blocks), pp * virtual)
    return [chunks_of(ranges, rank, pp) for rank in range(pp)]


def relay(
    models: Sequence[nn.Module],
    chunks: Sequence[tuple[Chunk, ...]],
    inputs: Sequence[Tensor | None],
    weighting_BLC: Tensor,
) -> Tensor:
    """Forward and backward through pipeline ranks in one process, tensors handed over as between processes.

    Args:
        models, chunks: of each pipeline rank.
        inputs: of the whole model: x_t, t, condition, positions, attend.
        weighting_BLC: the loss is the output times this, summed.
    Returns:
        The output (B, L, C).
    """
    x_t, t, condition, positions, attend = inputs
    passed, packed, out = [], None, None
    virtual = len(chunks[0])
    for v, rank in ((v, rank) for v in range(virtual) for rank in range(len(models))):
        model, chunk = models[rank], chunks[rank][v]
        if chunk.first:
            packed = model.enter(x_t, t, condition, positions, attend)
        else:
            packed = packed.detach().requires_grad_()
            passed[-1].append(packed)
        assert len(packed) == model.packed_length(x_t.shape[1], condition.shape[1])
        packed = model.run(packed, chunk, positions, condition.shape[1], attend)
        if chunk.last:
            out = model.leave(packed, x_t.shape[1])
        else:
            passed.append([packed])
    (out * weighting_BLC).sum().backward()
    for sent, received in reversed(passed):
        sent.backward(received.grad)
    return out.detach()


def perturbed(model: nn.Module):
    """Leave the zero gates of the start, so that everything has an influence."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return model


def copy_weights(part: nn.Module, whole: nn.Module, tp_rank: int = 0, tp_size: int = 1):
    """Give a chunk, or a tensor-parallel rank's slice of it, the weights of the whole model."""
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, weight in part.named_parameters():
            weight.copy_(slice_like(weight, weights[name], tp_rank, tp_size))
    return part


def slice_like(weight: Tensor, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a full weight, or of its gradient, that a tensor-parallel rank holds."""
    if not getattr(weight, "tensor_model_parallel", False):
        return full
    return full.chunk(tp_size, weight.partition_dim)[tp_rank]


def inputs(
    samples: int = 3, rows: int = 2, columns: int = 3, t: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy tokens, timesteps, condition tokens and positions, fp64."""
    torch.manual_seed(1)
    return (
        torch.randn(samples, rows * columns, TOKEN_CHANNELS, dtype=torch.float64),
        torch.rand(samples),
        torch.randn(samples, t, CONDITION_WIDTH, dtype=torch.float64),
        grid_positions(rows, columns),
    )


def saved_bytes(model: nn.Module, given: tuple) -> int:
    """Bytes of activations that the forward pass keeps for the backward pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(*given)
    del out
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)
