"""Weights as a function of (seed, parameter name), so that every parallel layout starts from the same
numbers."""

import hashlib

import torch
from torch import nn


@torch.no_grad()
def initialize(module: nn.Module, seed: int, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Set every parameter in place.

    Matrices: N(0, 1 / fan_in), unless the parameter carries `init_std`. Vectors named `bias`: zero. Other
    vectors (norms): one. A tensor-parallel slice is cut from the full matrix, which is drawn in fp32 on the
    CPU from a generator seeded by name.
    """
    for name, parameter in module.named_parameters():
        std = getattr(parameter, "init_std", None)
        if std is None and parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if std == 0.0:
            parameter.zero_()
            continue
        shape, axis = list(parameter.shape), getattr(parameter, "partition_dim", -1)
        split = getattr(parameter, "tensor_model_parallel", False) and tp_size > 1
        if split:
            shape[axis] *= tp_size
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        full = torch.randn(shape, generator=generator) * (std if std is not None else shape[-1] ** -0.5)
        parameter.copy_(full.chunk(tp_size, axis)[tp_rank] if split else full)
