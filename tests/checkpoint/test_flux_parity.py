"""Our MMDiT is diffusers' FluxTransformer2DModel: of the same weights and inputs come the same outputs and
gradients.

In fp64 diffusers still computes sinusoids, cosines, sines and the rotation in fp32: its lines say `.float()`.
The fp64 tests run those very lines with `Tensor.double` in the place of `Tensor.float`, so that the
arithmetic is compared and not its rounding. Nothing of ours says `.float()`, and it runs as it is. One test
compares with the class as it stands, in fp64, to what fp32 angles allow.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from iomm.checkpoint.names import family_table, their_config
from iomm.config import GeneratorConfig
from iomm.flow.path import grid_positions
from iomm.model.mmdit import MMDiT
from tests.model.small_models import make

HEADS, WIDTH = 3, 48
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


def small(double: int, single: int, pooled: int | None, guidance: bool) -> GeneratorConfig:
    return GeneratorConfig(
        hidden_size=WIDTH,
        heads=HEADS,
        double_blocks=double,
        single_blocks=single,
        rope_axes=(4, 6, 6),
        token_channels=20,
        condition_width=28,
        pooled_width=pooled,
        guidance_embedding=guidance,
    )


OURS_B = small(2, 0, None, False)  # as the B and L presets: double blocks only, and neither input
SCHNELL = small(1, 2, 24, False)
DEV = small(2, 1, 24, True)
SINGLE = small(0, 2, 24, True)
OURS_MIXED = small(1, 1, None, False)
RANKS = dataclasses.replace(small(2, 1, 24, True), hidden_size=64, heads=4)  # heads divide over two ranks
SIZES = [(3, (3, 5), 7), (1, (4, 4), 1), (1, (2, 7), 70)]  # batch, rows and columns, condition tokens
CONFIGS = {"b": OURS_B, "schnell": SCHNELL, "dev": DEV, "single": SINGLE, "mixed": OURS_MIXED}


def random_weights(config: GeneratorConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Ours by name, whole; no gate is zero, so that everything has an influence."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in family_table(config).ours.items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        scaled = 0.3 * drawn if len(shape) == 1 else shape[1] ** -0.5 * drawn
        weights[name] = (scaled + (1.0 if ".norm." in name else 0.0)).to(dtype)
    return weights


def stock(config: GeneratorConfig, weights: dict[str, Tensor]) -> FluxTransformer2DModel:
    """The stock class with our weights, through the table."""
    table = family_table(config)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(their_config(config))
    mapped = {name: table.to_theirs(name, weights.__getitem__).clone() for name in table.theirs}
    model.load_state_dict(mapped, assign=True)
    return model


def pair(config: GeneratorConfig, dtype: torch.dtype) -> tuple[MMDiT, FluxTransformer2DModel]:
    """Ours, and the stock class with the same weights."""
    ours, weights = make(config, dtype), random_weights(config, dtype)
    ours.load_state_dict(weights)
    return ours, stock(config, weights)


def draw(config: GeneratorConfig, batch: int, grid: tuple[int, int], tokens: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return drawn.requires_grad_()

    return {
        "x": normal(batch, grid[0] * grid[1], config.token_channels),
        "condition": normal(batch, tokens, config.condition_width),
        "pooled": None if config.pooled_width is None else normal(batch, config.pooled_width),
        "t": torch.rand(batch, generator=generator, dtype=torch.float64).to(dtype),
        "guidance": torch.linspace(1.0, 7.0, batch).to(dtype) if config.guidance_embedding else None,
        "positions": grid_positions(*grid),
    }


def run_ours(model: MMDiT, x: Any) -> Tensor:
    return model(
        x["x"],
        x["t"],
        x["condition"],
        x["positions"],
        pooled_BP=x["pooled"],
        guidance_B=x["guidance"],
    )


def run_theirs(model: FluxTransformer2DModel, x: Any) -> Tensor:
    tokens, dtype = x["condition"].shape[1], x["x"].dtype
    pooled = torch.randn(len(x["x"]), 1, dtype=dtype) if x["pooled"] is None else x["pooled"]
    return model(
        hidden_states=x["x"],
        encoder_hidden_states=x["condition"],
        pooled_projections=pooled,  # of a model of ours without one: any number, the weights are zero
        timestep=x["t"],
        img_ids=x["positions"].to(dtype),
        txt_ids=torch.zeros(tokens, 3, dtype=dtype),
        guidance=x["guidance"],
    ).sample


def weighting(output: Tensor) -> Tensor:
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return drawn.to(output.dtype)


def gradients(output: Tensor, x: Any, model: torch.nn.Module) -> dict[str, Tensor]:
    """Of a fixed weighted sum, for inputs and weights; zero where nothing reads a weight."""
    inputs = {f"input {k}": v for k, v in x.items() if v is not None and v.requires_grad}
    for tensor in (*model.parameters(), *inputs.values()):
        tensor.grad = None
    (output * weighting(output)).sum().backward()
    tensors = inputs | dict(model.named_parameters())
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in tensors.items()}


def assert_close(ours: Tensor, theirs: Tensor, limit: float, what: str) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    largest = theirs.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    assert difference <= limit * largest, f"{what}: {difference:.2e}, largest value {largest:.2e}"


def compare(
    config: GeneratorConfig, batch: int, grid: tuple[int, int], tokens: int, dtype: torch.dtype
) -> None:
    ours, theirs = pair(config, dtype)
    x, table, limit = draw(config, batch, grid, tokens, dtype), family_table(config), LIMIT[dtype]
    out_ours = run_ours(ours, x)
    grads_ours = gradients(out_ours, x, ours)
    out_theirs = run_theirs(theirs, x)
    grads_theirs = gradients(out_theirs, x, theirs)
    assert_close(out_ours, out_theirs, limit, "output")
    for name in (n for n in grads_ours if n.startswith("input")):
        assert_close(grads_ours[name], grads_theirs[name], limit, name)
    # Gradients transform as the weights do: every relation of the table is a permutation.
    for name in table.ours:
        assert_close(grads_ours[name], table.to_ours(name, grads_theirs.__getitem__), limit, name)


@pytest.fixture
def diffusers_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(("batch", "grid", "tokens"), SIZES)
def test_outputs_and_gradients_equal_the_stock_classes_in_fp32(
    name: str, batch: int, grid: tuple[int, int], tokens: int
) -> None:
    compare(CONFIGS[name], batch, grid, tokens, torch.float32)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(("batch", "grid", "tokens"), SIZES)
@pytest.mark.usefixtures("diffusers_in_fp64")
def test_outputs_and_gradients_equal_the_stock_classes_in_fp64(
    name: str, batch: int, grid: tuple[int, int], tokens: int
) -> None:
    compare(CONFIGS[name], batch, grid, tokens, torch.float64)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_stock_class_as_it_stands_differs_in_fp64_by_its_fp32_angles_only(name: str) -> None:
    ours, theirs = pair(CONFIGS[name], torch.float64)
    x = draw(CONFIGS[name], 2, (5, 3), 4, torch.float64)
    assert_close(run_ours(ours, x), run_theirs(theirs, x), 1e-4, "output")  # 7000 rad, in fp32: 4e-4


def test_of_a_model_without_pooled_input_the_stock_class_gives_the_same_bits_whatever_it_is_fed() -> None:
    _, theirs = pair(OURS_MIXED, torch.float32)
    x = draw(OURS_MIXED, 2, (2, 3), 4, torch.float32)
    fed = [run_theirs(theirs, x | {"pooled": torch.full((2, 1), value)}) for value in (0.0, -3.0, 1e6)]
    assert torch.equal(fed[0], fed[1]) and torch.equal(fed[0], fed[2])


def test_guidance_and_pooled_text_steer_the_output() -> None:
    ours, _ = pair(DEV, torch.float32)
    x = draw(DEV, 2, (2, 3), 4, torch.float32)
    base = run_ours(ours, x)
    for name in ("guidance", "pooled"):
        assert (run_ours(ours, x | {name: x[name] + 0.5}) - base).abs().max() > 1e-2


@pytest.mark.usefixtures("diffusers_in_fp64")
def test_the_stock_classes_weights_make_the_same_model_on_two_tensor_parallel_ranks(
    tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    theirs = stock(RANKS, random_weights(RANKS, torch.float64))
    x = draw(RANKS, 2, (3, 4), 5, torch.float64)
    output = run_theirs(theirs, x)
    given = {
        "config": dataclasses.asdict(RANKS),
        "weights": theirs.state_dict(),
        "inputs": {name: value if value is None else value.detach() for name, value in x.items()},
        "output": output.detach(),
        "weighting": weighting(output),
        "gradients": gradients(output, x, theirs),
    }
    torch.save(given, tmp_path / "stock.pt")
    torchrun(Path(__file__).parent / "ranks_flux.py", tmp_path / "stock.pt")
