"""What an operator says about itself: `Op`, its `Case`s and its `Compile`s.

One record feeds the parity test, the memory checker, the ahead-of-time compile gate and the benchmark, so a
new operator is one file. `iomm_kernels.OPS` lists them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[torch.dtype, torch.device], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One concrete call, small enough for Triton's interpreter (7 ms a program)."""

    name: str
    make: Make  # seeded positional arguments of `fused` and of `reference`; floating tensors in the dtype
    grads: bool = True  # False: forward only, for calls without a gradient (an empty batch has one)


@dataclass(frozen=True, kw_only=True)
class Compile:
    """One shipped configuration of one kernel, compiled ahead of time for sm_90a, at one stated shape."""

    name: str  # says operator, pass, width and dtype: "modulate forward 1536 bf16"
    kernel: Any  # the `triton.jit` function
    signature: dict[str, str]  # Triton's types of all arguments that are no constexpr: "*bf16", "i32", "fp32"
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]  # arguments (pointers, lengths, strides) divisible by 16 in a real call
    num_warps: int
    num_stages: int = 3
    min_occupancy: float  # bound on resident warps / 64
    streaming: bool  # bound by memory: at least 95 % of its global accesses have to be 128 bits wide
    bytes_min: int  # inputs once, outputs once, of one launch at the stated shape
    bytes_actual: int  # what the launch loads and stores (see `Op.bytes_issued`)
    # Narrow accesses that read or write one number a program or a row: no rows, so not in that share.
    scalars: int = 0
    dot: bool = False  # tensor-core instructions have to appear


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operator.

    `fused(*args, provider=...)` and `reference(*args)` take the same positional arguments and return the same
    structure. The reference is plain PyTorch in any floating dtype, fp64 included, and differentiable.
    """

    name: str
    fused: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    differentiable: tuple[int, ...]  # positions of the arguments that get gradients
    bytes_moved: Callable[..., int]  # forward, from the arguments: inputs once, outputs once
    bytes_issued: Callable[..., int]  # likewise: upper bound of what Triton's kernels access
    compiles: tuple[Compile, ...]
    # (preset "b" | "l" | "xl", image side in px 512 | 1024, dtype, device) -> arguments of a training step
    bench: Callable[[str, int, torch.dtype, torch.device], tuple[Any, ...]]
    flops: Callable[..., int] | None = None  # forward, of matrix products; None where memory is the bound


def draw(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal numbers for a case or a benchmark; the same ones in every dtype and on every device,
    rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
