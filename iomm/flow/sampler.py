"""Samplers: integrate dx/dt = v(x, t) from noise (t = 1) to data (t = 0).

Euler takes one velocity a step, Heun two (its last step, which would ask for t = 0, is Euler's).
Classifier-free guidance asks for the conditional and the null velocity, so it doubles the count. NFE =
network evaluations for one image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iomm.flow.timesteps import sampling_timesteps

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_BLC, t_B) -> v_BLC
Method = Literal["euler", "heun"]


@dataclass(frozen=True)
class Guided:
    """v = v_null + g (v_cond - v_null). g = 1 is the conditional velocity alone, g = 0 the null one; each
    then costs one NFE."""

    conditional: Velocity
    null: Velocity
    scale: float

    @property
    def nfe(self) -> int:
        return 1 if self.scale in (0.0, 1.0) else 2

    def __call__(self, x_BLC: Tensor, t_B: Tensor) -> Tensor:
        if self.scale == 1.0:
            return self.conditional(x_BLC, t_B)
        null = self.null(x_BLC, t_B)
        return null if self.scale == 0.0 else null + self.scale * (self.conditional(x_BLC, t_B) - null)


@dataclass(frozen=True)
class Sampled:
    x_BLC: Tensor
    nfe: int


@torch.no_grad()
def sample(
    velocity: Velocity | Guided,
    noise_BLC: Tensor,
    *,
    steps: int,
    method: Method = "euler",
    shift: float = 1.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Sampled:
    """Integrate from `noise_BLC` at t = 1 to t = 0 in `steps` steps.

    Args:
        shift: resolution shift of the time grid, applied once.
        on_step: called with (step, x_BLC) after each step, for previews.
    Raises:
        ValueError: an unknown method or fewer than one step.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"sampler method {method!r} is unknown. Choose euler or heun.")
    grid = sampling_timesteps(steps, shift).tolist()
    evaluations = velocity.nfe if isinstance(velocity, Guided) else 1
    x, nfe = noise_BLC, 0

    def at(x_BLC: Tensor, t: float) -> Tensor:
        return velocity(x_BLC, torch.full((x_BLC.shape[0],), t, device=x_BLC.device, dtype=torch.float32))

    for step, (t, t_next) in enumerate(zip(grid, grid[1:], strict=False)):
        v = at(x, t)
        nfe += evaluations
        following = x + (t_next - t) * v
        if method == "heun" and t_next > 0:
            v = 0.5 * (v + at(following, t_next))
            nfe += evaluations
            following = x + (t_next - t) * v
        x = following
        if on_step is not None:
            on_step(step, x)
    return Sampled(x, nfe)
