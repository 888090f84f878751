"""Fused operators for image-only pre-training on Hopper GPUs, each with a reference in plain PyTorch.

One operator a file, running header -> reference -> forward -> backward -> autograd -> public function -> `OP`
record (`iomm_kernels.record`). `OPS` lists the records; the parity test, the ahead-of-time compile gate and
the benchmark read them.

This package imports torch and triton only, and nothing of `iomm`. Triton need not be installed.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iomm_kernels.record import Op

    OPS: tuple[Op, ...]  # all records; reading it imports the operators, and Triton where it is installed

# One operator a name; a new operator is one file and one word here.
MODULES = (
    "mask_tokens",
    "pack_tokens",
    "masked_cross_attention",
    "prefix_attention",
    "modulate",
    "gated_residual",
    "gated_residual_modulate",
    "modulate_fp8",
    "flow_noise",
    "velocity_mse",
    "qk_norm_rope",
)


def __getattr__(name: str) -> "tuple[Op, ...]":
    if name == "OPS":
        return tuple(importlib.import_module(f"iomm_kernels.{module}").OP for module in MODULES)
    raise AttributeError(f"module 'iomm_kernels' has no attribute {name!r}")
