"""Small generators of either family, and inputs for them."""

import torch
from torch import Tensor, nn

from iomm.config import GeneratorConfig, ParallelConfig
from iomm.flow.path import grid_positions
from iomm.model.init import initialize
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.mesh import start
from iomm.system import FAMILIES

TOKEN_CHANNELS, CONDITION_WIDTH = 8, 12


def make(config: GeneratorConfig, dtype: torch.dtype = torch.float64, seed: int = 0):
    """The family's model with its initial weights; uninitialised on the meta device."""
    parallel = ParallelConfig()
    mesh = start(parallel)
    layers = Layers(transformer_config(config.hidden_size, config.heads, dtype, mesh, parallel), mesh)
    model = FAMILIES[config.family](config, layers)
    if model.image_in.weight.device.type != "meta":
        initialize(model, seed)
    return model


def perturbed(model: nn.Module):
    """Leave the zero gates of the start, so that everything has an influence."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return model


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
