"""The layers a model is built from, in one process; several ranks are in test_ranks.py."""

import pytest
import torch
from torch import nn

from iomm.config import ParallelConfig
from iomm.parallel.backend import Layers, transformer_config
from iomm.parallel.mesh import Mesh


def _layers(mesh: Mesh, dtype: torch.dtype = torch.float64) -> Layers:
    return Layers(transformer_config(8, 2, dtype, mesh, ParallelConfig()), mesh)


def _randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        nn.init.normal_(weight, generator=generator)
    return module


@pytest.mark.parametrize("kind", ["column", "row", "replicated"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_one_tensor_and_computes_a_linear(mesh: Mesh, kind: str, bias: bool) -> None:
    layer = _randomised(getattr(_layers(mesh), kind)(8, 6, bias=bias))
    x_BLD = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.linear(x_BLD, layer.weight, layer.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x_BLD), expected)


# Megatron's own row layer forgets to hand its group on; the default group is the right one here.
@pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")
@pytest.mark.parametrize("kind", ["column", "row"])
def test_the_direct_path_has_the_gradients_of_megatrons_own(mesh: Mesh, kind: str) -> None:
    layer = _randomised(getattr(_layers(mesh), kind)(8, 6))
    x_BD = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x_BD, *layer.parameters()]
    direct = torch.autograd.grad(layer(x_BD).square().sum(), inputs)
    megatron = type(layer).__mro__[1]
    theirs = torch.autograd.grad(megatron.forward(layer, x_BD)[0].square().sum(), inputs)
    for ours, reference in zip(direct, theirs, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_take_the_dtype_of_the_configuration(mesh: Mesh, dtype: torch.dtype) -> None:
    layers = _layers(mesh, dtype)
    made = nn.ModuleList(
        [layers.column(8, 8), layers.row(8, 8), layers.replicated(8, 8), layers.head_norm(4)]
    )
    assert {w.dtype for w in made.parameters()} == {dtype}


def test_layers_of_billions_of_weights_can_be_counted_on_the_meta_device(mesh: Mesh) -> None:
    layers = _layers(mesh, torch.float32)
    with torch.device("meta"):
        made = nn.ModuleList(
            [layers.column(30_000, 30_000), layers.row(30_000, 30_000), layers.head_norm(128)]
        )
    assert sum(w.numel() for w in made.parameters()) == 2 * 30_000 * 30_001 + 128


def test_a_state_dict_holds_weights_and_nothing_else_and_loads_strictly(mesh: Mesh) -> None:
    made = nn.Sequential(_layers(mesh).column(8, 8), _layers(mesh).row(8, 8))
    _randomised(made)
    state = made.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    made.load_state_dict(state, strict=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_transformer_engine_without_a_gpu_is_refused_with_the_way_out(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="te, but .* needs a GPU .* Or set parallel.backend=local"):
        transformer_config(8, 2, torch.float32, mesh, ParallelConfig(backend="te"))
