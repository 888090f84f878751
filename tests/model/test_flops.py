"""The FLOP formula against a count of the operators that really run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iomm.config import GeneratorConfig
from iomm.flow.path import grid_positions
from iomm.model.flops import generator_forward_flops
from tests.model.test_mmdit import make


@pytest.mark.parametrize(("double", "single"), [(2, 0), (1, 3)])
def test_formula_equals_the_counted_operators(double, single):
    config = GeneratorConfig(
        hidden_size=64,
        heads=2,
        double_blocks=double,
        single_blocks=single,
        rope_axes=(8, 12, 12),
        condition_width=48,
    )
    with torch.device("meta"):
        model = make(config, torch.float32)
        arguments = (torch.empty(1, 20, 64), torch.empty(1), torch.empty(1, 7, 48), grid_positions(4, 5))
        with FlopCounterMode(display=False) as counter:
            model(*arguments)
    formula = generator_forward_flops(config, 20, 7)
    assert abs(counter.get_total_flops() / formula - 1) < 1e-3
