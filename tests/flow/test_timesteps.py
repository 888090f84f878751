"""Timesteps: distributions, the shift, the sampler's grid."""

import pytest
import torch

from iomm.config import FlowConfig
from iomm.flow.timesteps import evaluation_timesteps, sampling_timesteps, shift_timesteps, training_timesteps

INDEX = torch.arange(20_000)


def test_uniform_timesteps_fill_the_interval_evenly():
    t = training_timesteps(FlowConfig(), 0, INDEX)
    counts = torch.histc(t, 10, 0, 1)
    assert (counts - 2000).abs().max() < 200
    assert t.dtype == torch.float32


def test_logit_normal_timesteps_have_the_logits_mean_and_std():
    t = training_timesteps(FlowConfig(timestep="logit_normal", logit_mean=0.8, logit_std=0.5), 0, INDEX)
    logit = torch.logit(t.double())
    assert abs(logit.mean() - 0.8) < 0.02 and abs(logit.std() - 0.5) < 0.02


def test_shift_moves_mass_towards_noise_and_keeps_the_ends():
    t = torch.linspace(0, 1, 101)
    shifted = shift_timesteps(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > t[1:-1]).all() and (shifted.diff() > 0).all()
    assert shift_timesteps(torch.tensor(0.5), 3.0) == 0.75
    plain = training_timesteps(FlowConfig(), 0, INDEX[:100])
    torch.testing.assert_close(
        training_timesteps(FlowConfig(shift=3.0), 0, INDEX[:100]), shift_timesteps(plain, 3.0)
    )


def test_the_sampler_starts_at_exactly_one_and_ends_at_exactly_zero():
    for shift in (1.0, 3.0):
        grid = sampling_timesteps(7, shift)
        assert len(grid) == 8 and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_a_sampler_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        sampling_timesteps(0, 1.0)


def test_evaluation_timesteps_are_midpoints():
    assert evaluation_timesteps(4).tolist() == [0.125, 0.375, 0.625, 0.875]
