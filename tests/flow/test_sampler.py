"""Samplers against exact solutions, guidance, and the count of network evaluations."""

import math

import pytest
import torch

from iomm.flow.sampler import Guided, GuidedEdit, sample, trajectory


def exact_field(mean):
    """Velocity of the path from N(0, I) at t = 1 to a point mass at t = 0: straight lines."""
    return lambda x, t: (x - mean) / t.view(-1, 1, 1).to(x.dtype)


def test_euler_follows_straight_lines_exactly_whatever_the_steps():
    mean, noise = torch.full((1, 2, 3), 2.0, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    for steps in (1, 2, 7):
        torch.testing.assert_close(
            sample(exact_field(mean), noise, steps=steps).x_BLC, mean.expand(4, -1, -1)
        )


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_methods_order(method, order):
    # dx/dt = x: from t = 1 to 0 the solution shrinks by e.
    noise = torch.ones(1, 1, 1, dtype=torch.float64)

    def error(steps):
        # Heun's last step is Euler's, so look at it before that step.
        steps_taken = trajectory(lambda x, t: x, noise, steps=steps, method=method)
        seen = [step.x_BLC.item() for step in steps_taken]
        at = 1 / steps if method == "heun" else 0.0
        return abs((seen[-2] if method == "heun" else seen[-1]) - math.exp(at - 1))

    assert 0.8 * 2**order < error(20) / error(40) < 1.25 * 2**order


def test_nfe_counts_network_evaluations():
    calls = 0

    def velocity(x, t):
        nonlocal calls
        calls += 1
        return x

    noise = torch.zeros(1, 1, 1)
    for method, guided, expected in [
        ("euler", False, 5),
        ("heun", False, 9),
        ("euler", True, 10),
        ("heun", True, 18),
    ]:
        calls = 0
        field = Guided(velocity, velocity, 3.0) if guided else velocity
        assert sample(field, noise, steps=5, method=method).nfe == expected == calls


def test_guidance_extrapolates_from_null_through_conditional():
    cond, null = (lambda x, t: torch.full_like(x, 3.0)), (lambda x, t: torch.full_like(x, 1.0))
    x, t = torch.zeros(1, 1, 1), torch.ones(1)
    assert [Guided(cond, null, g)(x, t).item() for g in (0.0, 1.0, 2.0, 0.5)] == [1.0, 3.0, 5.0, 2.0]
    assert [Guided(cond, null, g).nfe for g in (0.0, 1.0, 2.0)] == [1, 1, 2]


def constants(*values):
    return [lambda x, t, value=value: torch.full_like(x, value) for value in values]


def test_edit_guidance_goes_from_null_towards_the_image_and_from_there_towards_the_text():
    velocities, x, t = constants(7.0, 3.0, 1.0), torch.zeros(1, 1, 1), torch.ones(1)
    for image, text, expected, nfe in [
        (1.5, 4.0, 1 + 1.5 * 2 + 4 * 4, 3),
        (1.0, 2.0, 3 + 2 * 4, 2),  # no null
        (2.0, 2.0, 1 + 2 * 6, 2),  # no image alone: one guidance scale
        (1.0, 1.0, 7.0, 1),
        (1.0, 0.0, 3.0, 1),
        (0.0, 0.0, 1.0, 1),
    ]:
        guided = GuidedEdit(*velocities, image, text)
        assert (guided(x, t).item(), guided.nfe) == (expected, nfe)
        assert sample(guided, x, steps=3).nfe == 3 * nfe


def test_a_trajectorys_estimates_are_exact_on_straight_lines_and_its_last_step_is_the_sample():
    mean, noise = torch.full((1, 2, 3), 2.0, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    steps = list(trajectory(exact_field(mean), noise, steps=3))
    for step in steps:
        torch.testing.assert_close(step.clean_BLC, mean.expand(4, -1, -1))
    assert torch.equal(steps[-1].x_BLC, sample(exact_field(mean), noise, steps=3).x_BLC)
    assert [step.nfe for step in steps] == [1, 2, 3]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'rk4' is unknown. Choose euler or heun"):
        sample(lambda x, t: x, torch.zeros(1, 1, 1), steps=1, method="rk4")
