"""Choice of a provider, and what the kernels share.

Providers of an operator:
    eager   the reference, plain PyTorch; any device and dtype
    triton  the kernel; CUDA tensors (CPU tensors under TRITON_INTERPRET=1, for tests)
    csrc    C++ or CUDA C++ of csrc/, called as torch.ops.iomm_csrc.<name>
    auto    CUDA: triton, else eager. CPU: csrc where it is built, else eager. Logged once with the reason.

What is asked for and cannot be had is an error that names the way out, never another provider.

`iomm_kernels.csrc.problem(name)` says why torch.ops.iomm_csrc.<name> is not there, None if it is. A csrc
operator takes the arguments of the operator of that name in this package's file, without `provider`, and with
`norm` as a bool that says RMSNorm.

Operator files import `triton` and `tl` from here: where Triton is not installed (CPU builds of PyTorch) they
are stand-ins that let the file be read, and no kernel is ever launched.
"""

import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from iomm_kernels import csrc

Provider = Literal["auto", "eager", "triton", "csrc"]
PROVIDERS = ("auto", "eager", "triton", "csrc")
HAS_TRITON = importlib.util.find_spec("triton") is not None

log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


class _NoTriton:
    """Stands for `triton` and `triton.language` where they are not installed."""

    constexpr = None
    dtype = None

    @staticmethod
    def jit(function: Any) -> Any:
        function.arg_names = list(inspect.signature(function).parameters)
        return function

    @staticmethod
    def cdiv(x: int, y: int) -> int:
        return -(-x // y)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << max(0, n - 1).bit_length()


if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = tl = _NoTriton

# triton.jit, typed as what it gives: launch options and Python numbers for constexprs are welcome.
jit: Callable[[Callable[..., Any]], Any] = triton.jit
# Smallest power of two that is at least n, typed for kernels too, where n is a constexpr.
next_power_of_2: Any = triton.next_power_of_2


def interpreted() -> bool:
    """True where Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def resolve(name: str, provider: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The provider that serves operator `name` on this kind of device in this dtype: "eager", "triton" or
    "csrc".

    Raises:
        ValueError: the provider is unknown, or cannot serve here.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"{name}: provider {provider!r} is none of {', '.join(PROVIDERS)}.")
    if provider == "auto":
        return _automatic(name, device_type, dtype)
    if problem := _problem(name, provider, device_type, dtype):
        others = [other for other in ("triton", "csrc") if _problem(name, other, device_type, dtype) is None]
        raise ValueError(
            f"{name}: provider {provider!r} was asked for on {device_type}, but it {problem}. Otherwise use "
            f"provider {' or '.join([*map(repr, others), repr('eager')])}, or 'auto'."
        )
    return provider


def _automatic(name: str, device_type: str, dtype: torch.dtype) -> str:
    wanted = "triton" if device_type == "cuda" else "csrc"
    problem = _problem(name, wanted, device_type, dtype)
    choice = wanted if problem is None else "eager"
    if (name, device_type) not in _logged:
        _logged.add((name, device_type))
        log.info("%s on %s: %s%s", name, device_type, choice, f": {wanted} {problem}" if problem else "")
    return choice


def _problem(name: str, provider: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the provider cannot serve; None if it can."""
    if provider == "eager":
        return None
    if dtype == torch.float64:
        return "computes in fp32 and does not take float64"
    return triton_problem(device_type) if provider == "triton" else csrc.problem(name, device_type)


def triton_problem(device_type: str) -> str | None:
    """Why Triton cannot serve tensors of this kind of device; None if it can."""
    if not HAS_TRITON:
        return "is not installed (pip install triton)"
    if device_type == "cuda":
        return None if not interpreted() else "interprets (TRITON_INTERPRET=1), which serves CPU tensors"
    if device_type == "cpu" and interpreted():
        return None
    return "compiles for CUDA tensors only (TRITON_INTERPRET=1 runs it on CPU tensors, for tests)"


def contiguous_rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def vjp(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], gradients: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` in plain PyTorch: the eager half of a backward operator.

    torch.library runs operators below autograd, which therefore records nothing; this puts its dispatch keys
    back. (torch.func.vjp would do, but not under the modes of opcheck and of tracing.)
    """
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradFunctionality", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        found = torch.autograd.grad(function(*leaves), leaves, gradients)
    return tuple(gradient.clone() for gradient in found)


def tensor_bytes(*values: Any) -> int:
    """Bytes of all tensors among the values."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
