"""The path between data and noise, and the packing of latents into tokens."""

import pytest
import torch

from iomm.flow.path import (
    grid_positions,
    interpolate,
    patchify,
    to_velocity,
    unpatchify,
    velocity_target,
)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)


def test_path_returns_data_at_t0_and_noise_at_t1(pair):
    x, z = pair
    assert torch.equal(interpolate(x, z, torch.zeros(3)), x)
    assert torch.equal(interpolate(x, z, torch.ones(3)), z)


def test_velocity_is_the_derivative_of_the_path(pair):
    x, z = pair
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-6
    slope = (interpolate(x, z, t + h) - interpolate(x, z, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_target(x, z), rtol=1e-8, atol=1e-8)


def test_clean_and_velocity_are_two_views_of_one_prediction(pair):
    x, z = pair
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t, v = interpolate(x, z, t), velocity_target(x, z)
    torch.testing.assert_close(to_velocity(x, x_t, t, "clean", 0.05), v)
    assert to_velocity(v, x_t, t, "velocity", 0.05) is v


def test_clean_prediction_near_the_data_is_bounded_by_the_clamp(pair):
    x, z = pair
    x_t = interpolate(x, z, torch.full((3,), 1e-6))
    v = to_velocity(x + 1, x_t, torch.full((3,), 1e-6), "clean", 0.05)
    assert v.abs().max() < 1 / 0.05 * (1 + 1e-4)


def test_patchify_packs_as_flux_does_and_unpatchify_inverts_it():
    from diffusers import FluxPipeline

    latent = torch.randn(2, 16, 6, 10)
    tokens = patchify(latent, 2)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latent, 2, 16, 6, 10))
    assert torch.equal(unpatchify(tokens, 2, 3, 5), latent)


def test_patchify_refuses_an_odd_side():
    with pytest.raises(ValueError, match="latent 5 x 6 is not a multiple of the patch 2"):
        patchify(torch.zeros(1, 1, 5, 6), 2)


def test_unpatchify_refuses_a_grid_of_another_size():
    with pytest.raises(ValueError, match="6 tokens do not fill a grid of 2 x 2"):
        unpatchify(torch.zeros(1, 6, 4), 2, 2, 2)


def test_grid_positions_count_rows_and_columns():
    assert grid_positions(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
