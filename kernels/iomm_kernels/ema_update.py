"""ema_update: the exponential moving average of many weights, in place: e <- lerp(e, w, 1 - decay).

Shapes: any; each average has its weight's. Averages fp32 (fp64 with the eager provider).
Numerics: torch.lerp's formula in fp32; fp16 and bf16 weights are widened, not the average narrowed.
Bytes: e read and written, w read once. Plain PyTorch makes fp32 copies of bf16 weights first.

It has no record among `OPS`: it works on lists, in place, and has no gradient. The kernel is CUDA C++
(csrc/ema_update.cu), one launch for up to 48 tensors; not yet run on a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from iomm_kernels import csrc


def reference(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Plain PyTorch, in place."""
    now = [w.to(e.dtype) for e, w in zip(averages, weights, strict=True)]
    torch.ops.aten._foreach_lerp_.Scalar(list(averages), now, 1.0 - decay)


@torch.no_grad()
def ema_update(
    averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, provider: str = "auto"
) -> None:
    """Take the weights into their averages.

    Args:
        averages: changed in place.
        weights: one for each average, of one dtype.
        decay: in [0, 1).
        provider: "eager", "csrc" (CUDA tensors), or "auto": csrc where it is built and serves, else eager.
    Raises:
        ValueError: numbers, shapes or the decay do not fit, or csrc was asked for and cannot serve.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema_update: the decay {decay} is outside [0, 1).")
    if provider not in ("auto", "eager", "csrc"):
        raise ValueError(f"ema_update: provider {provider!r} is none of auto, eager, csrc.")
    shapes = [(tuple(e.shape), tuple(w.shape)) for e, w in zip(averages, weights, strict=False)]
    if len(averages) != len(weights) or any(e != w for e, w in shapes):
        raise ValueError(
            f"ema_update: {len(averages)} averages and {len(weights)} weights, shapes {shapes}. Give each "
            "average a weight of its shape."
        )
    if not averages:
        return
    problem = _csrc_problem(averages, weights)
    if provider == "csrc" and problem is not None:
        raise ValueError(
            f"ema_update: provider 'csrc' was asked for, but it {problem}. Use 'eager' or 'auto'."
        )
    if provider == "eager" or problem is not None:
        reference(averages, weights, decay)
    else:
        torch.ops.iomm_csrc.ema_update_(list(averages), list(weights), decay)


def _csrc_problem(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> str | None:
    if why := csrc.problem("ema_update_", averages[0].device.type):
        return why
    if any(e.dtype != torch.float32 for e in averages) or len({w.dtype for w in weights}) > 1:
        return "takes fp32 averages and weights of one dtype"
    if not all(x.is_contiguous() for x in (*averages, *weights)):
        return "takes contiguous tensors"
    return None
