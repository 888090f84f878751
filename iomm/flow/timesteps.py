"""Timesteps of training and of the samplers (METHOD.md section 1). t = 0 is data, t = 1 is noise."""

import torch
from torch import Tensor

from iomm.config import FlowConfig
from iomm.random import Stream, normal, uniform


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Resolution shift t' = s t / (1 + (s - 1) t): s > 1 moves mass towards noise. Maps [0, 1] onto
    itself."""
    return shift * t / (1 + (shift - 1) * t)


def training_timesteps(flow: FlowConfig, seed: int, index_B: Tensor) -> Tensor:
    """t of each sample, fp32 (B,), a function of (seed, global sample index); the shift is applied once,
    here."""
    if flow.timestep == "uniform":
        t_B = uniform(seed, Stream.TIMESTEP, index_B, 1)[:, 0]
    else:
        t_B = torch.sigmoid(
            flow.logit_mean + flow.logit_std * normal(seed, Stream.TIMESTEP, index_B, 1)[:, 0]
        )
    return shift_timesteps(t_B, flow.shift)


def sampling_timesteps(steps: int, shift: float) -> Tensor:
    """The sampler's grid, fp32 (steps + 1,), from exactly 1 down to exactly 0."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got {steps}.")
    return shift_timesteps(torch.linspace(1.0, 0.0, steps + 1), shift)


def evaluation_timesteps(n: int = 8) -> Tensor:
    """n midpoints (i + 1/2) / n: the fixed timesteps of the held-out loss."""
    return (torch.arange(n, dtype=torch.float32) + 0.5) / n
