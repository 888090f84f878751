"""Samplers: integrate dx/dt = v(x, t) from noise (t = 1) to data (t = 0).

Euler takes one velocity a step, Heun two (its last step, which would ask for t = 0, is Euler's).
Classifier-free guidance asks for the conditional and the null velocity, so it doubles the count; guidance by
image and text asks for three. NFE = network evaluations for one image.
"""

from collections import deque
from collections.abc import Callable, Iterator
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
class GuidedEdit:
    """v = v_null + s_I (v_image - v_null) + s_T (v_full - v_image), full being image and text
    (InstructPix2Pix, arXiv 2211.09800, equation 3). A velocity whose weight is 0 costs no NFE: s_I = 1 needs
    no null, s_I = s_T no image alone, s_T = 0 no text."""

    full: Velocity
    image: Velocity
    null: Velocity
    image_scale: float
    text_scale: float

    @property
    def _terms(self) -> list[tuple[float, Velocity]]:
        image, text = self.image_scale, self.text_scale
        terms = [(1 - image, self.null), (image - text, self.image), (text, self.full)]
        return [term for term in terms if term[0] != 0]

    @property
    def nfe(self) -> int:
        return len(self._terms)

    def __call__(self, x_BLC: Tensor, t_B: Tensor) -> Tensor:
        (weight, velocity), *others = self._terms
        v_BLC = weight * velocity(x_BLC, t_B)
        for weight, velocity in others:
            v_BLC = v_BLC + weight * velocity(x_BLC, t_B)
        return v_BLC


@dataclass(frozen=True)
class Sampled:
    x_BLC: Tensor
    nfe: int


@dataclass(frozen=True)
class Step:
    """Where a trajectory is after a step."""

    x_BLC: Tensor
    clean_BLC: Tensor  # data as estimated where the step began: x - t v
    nfe: int  # so far


def sample(
    velocity: Velocity | Guided | GuidedEdit,
    noise_BLC: Tensor,
    *,
    steps: int,
    method: Method = "euler",
    shift: float = 1.0,
) -> Sampled:
    """The end of `trajectory`.

    Raises:
        ValueError: as `trajectory`.
    """
    (last,) = deque(trajectory(velocity, noise_BLC, steps=steps, method=method, shift=shift), maxlen=1)
    return Sampled(last.x_BLC, last.nfe)


@torch.no_grad()
def trajectory(
    velocity: Velocity | Guided | GuidedEdit,
    noise_BLC: Tensor,
    *,
    steps: int,
    method: Method = "euler",
    shift: float = 1.0,
) -> Iterator[Step]:
    """Integrate from `noise_BLC` at t = 1 to t = 0, step by step.

    Args:
        shift: resolution shift of the time grid, applied once.
    Raises:
        ValueError: an unknown method or fewer than one step.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"sampler method {method!r} is unknown. Choose euler or heun.")
    grid = sampling_timesteps(steps, shift).tolist()
    evaluations = velocity.nfe if isinstance(velocity, Guided | GuidedEdit) else 1
    x, nfe = noise_BLC, 0

    def at(x_BLC: Tensor, t: float) -> Tensor:
        return velocity(x_BLC, torch.full((x_BLC.shape[0],), t, device=x_BLC.device, dtype=torch.float32))

    for t, t_next in zip(grid, grid[1:], strict=False):
        v = at(x, t)
        clean = x - t * v
        nfe += evaluations
        following = x + (t_next - t) * v
        if method == "heun" and t_next > 0:
            v = 0.5 * (v + at(following, t_next))
            nfe += evaluations
            following = x + (t_next - t) * v
        x = following
        yield Step(x, clean, nfe)
