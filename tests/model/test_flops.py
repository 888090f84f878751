"""The FLOP formula against a count of the operators that really run."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iomm.config import GeneratorConfig
from iomm.flow.path import grid_positions
from iomm.model.flops import block_costs, first_cost, generator_forward_flops, last_cost
from iomm.model.mmdit import unvaried_inputs
from tests.model.small_models import FLUX, Z_IMAGE, make, stages
from tests.model.test_single_stream import SMALL


@pytest.mark.parametrize(
    ("double", "single", "pooled_width", "guidance"),
    [(2, 0, None, False), (1, 3, None, False), (1, 1, 96, True)],
)
def test_formula_equals_the_counted_operators(double, single, pooled_width, guidance):
    config = GeneratorConfig(
        hidden_size=64,
        heads=2,
        double_blocks=double,
        single_blocks=single,
        rope_axes=(8, 12, 12),
        condition_width=48,
        pooled_width=pooled_width,
        guidance_embedding=guidance,
    )
    with torch.device("meta"):
        model = make(config, torch.float32)
        arguments = (torch.empty(1, 20, 64), torch.empty(1), torch.empty(1, 7, 48), grid_positions(4, 5))
        with FlopCounterMode(display=False) as counter:
            model(*arguments, **unvaried_inputs(config, 1, torch.device("meta")))
    formula = generator_forward_flops(config, 20, 7)
    assert abs(counter.get_total_flops() / formula - 1) < 1e-4


@pytest.mark.parametrize("tokens", [(4, 5, 7), (4, 8, 33)])
def test_formula_of_the_single_stream_family_equals_the_counted_operators(tokens):
    rows, columns, condition_tokens = tokens
    config = dataclasses.replace(
        SMALL, hidden_size=96, rope_axes=(16, 16, 16), token_channels=64, refiner_blocks=2
    )
    with torch.device("meta"):
        model = make(config, torch.float32)
        image, condition = torch.empty(1, rows * columns, 64), torch.empty(1, condition_tokens, 12)
        arguments = (image, torch.empty(1), condition, grid_positions(rows, columns))
        with FlopCounterMode(display=False) as counter:
            model(*arguments)
    formula = generator_forward_flops(config, rows * columns, condition_tokens)
    assert abs(counter.get_total_flops() / formula - 1) < 1e-3


@pytest.mark.parametrize(
    "config",
    [FLUX, dataclasses.replace(FLUX, double_blocks=3, single_blocks=0), Z_IMAGE],
    ids=["flux", "flux without single blocks", "z_image"],
)
def test_costs_of_entry_blocks_and_exit_equal_the_counted_operators_of_chunks(config):
    tokens, chunks = (32, 7), stages(config, 3, 1)
    costs = block_costs(config, *tokens)

    def counted(call, *arguments):
        with FlopCounterMode(display=False) as counter:
            result = call(*arguments)
        return result, counter.get_total_flops()

    with torch.device("meta"):
        model, positions = make(config), grid_positions(4, 8)
        x, condition = torch.empty(1, 32, config.token_channels), torch.empty(1, 7, config.condition_width)
        packed, flops = counted(model.enter, x, torch.empty(1), condition, positions)
        assert flops == first_cost(config, *tokens)
        for (chunk,) in chunks:
            packed, flops = counted(model.run, packed, chunk, positions, 7)
            assert flops == sum(costs[i] for i in chunk.blocks)
        _, flops = counted(model.leave, packed, 32)
        assert flops == last_cost(config, *tokens)
    assert generator_forward_flops(config, *tokens) == flops + sum(costs) + first_cost(config, *tokens)
