"""Run operators under Triton's interpreter and write down what failed. A script, in a process of its own:

    TRITON_INTERPRET=1 python tests/kernels/interpret_ops.py RESULT.json [OPERATOR ...]

RESULT.json maps "operator | case | check" to "" or to the error. Memory that nobody wrote holds NaN.
"""

import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "kernels")]

from memcheck import memory_checked, reversed_programs  # noqa: E402

import iomm_kernels  # noqa: E402
from iomm_kernels.record import Case, Op  # noqa: E402

CPU = torch.device("cpu")
Results = dict[str, Tensor]  # outputs and gradients by a name that says which


def arguments(op: Op, case: Case, dtype: torch.dtype) -> list[Any]:
    """A case's arguments; those that can be differentiated ask for it."""
    args = list(case.make(dtype, CPU))
    for i in op.differentiable:
        if case.grads and isinstance(args[i], Tensor):
            args[i] = args[i].detach().requires_grad_()
    return args


def in_fp64(op: Op, args: list[Any]) -> list[Any]:
    """The same numbers in fp64."""
    wide = [a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return [
        a.requires_grad_() if isinstance(a, Tensor) and args[i].requires_grad else a
        for i, a in enumerate(wide)
    ]


def run(op: Op, function: Callable[..., Any], args: list[Any]) -> Results:
    """Outputs, and gradients for a seeded gradient of each differentiable output."""
    outputs = [leaf for leaf in pytree.tree_leaves(function(*args)) if isinstance(leaf, Tensor)]
    results = {f"output {i}": leaf.detach() for i, leaf in enumerate(outputs)}
    roots = [leaf for leaf in outputs if leaf.requires_grad]
    inputs = {i: args[i] for i in op.differentiable if isinstance(args[i], Tensor) and args[i].requires_grad}
    if roots and inputs:
        generator = torch.Generator().manual_seed(7)
        seeds = [torch.randn(r.shape, generator=generator, dtype=torch.float32) for r in roots]
        seeds = [seed.to(outputs[0].dtype).to(root.dtype) for seed, root in zip(seeds, roots, strict=True)]
        gradients = torch.autograd.grad(roots, list(inputs.values()), seeds)
        results |= {f"gradient of argument {i}": g for i, g in zip(inputs, gradients, strict=True)}
    return results


def compare(fused: Results, eager: Results, exact: Results) -> None:
    """The fused error against fp64 may be twice the eager one plus one ulp of the largest value."""
    assert fused.keys() == exact.keys(), f"fused gives {list(fused)}, the reference {list(exact)}"
    for name, truth in exact.items():
        mine, theirs = fused[name], eager[name]
        assert mine.shape == truth.shape, f"{name}: shape {tuple(mine.shape)}, reference {tuple(truth.shape)}"
        assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype}, reference {theirs.dtype}"
        if not truth.is_floating_point():
            assert torch.equal(mine, truth), f"{name}: differs"
            continue
        if not truth.numel():
            continue
        largest = truth.abs().max().item()
        ulp = torch.finfo(mine.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
        error, allowed = ((x.double() - truth).abs().max().item() for x in (mine, theirs))
        assert error <= 2 * allowed + ulp, (
            f"{name}: error {error:.3g}, allowed twice eager's {allowed:.3g} plus {ulp:.3g}, an ulp of the "
            f"largest, {largest:.3g}"
        )


def fused_by(op: Op, provider: str) -> Callable[..., Any]:
    return lambda *args: op.fused(*args, provider=provider)


def check_parity(op: Op, case: Case, dtype: torch.dtype = torch.float32) -> None:
    args = arguments(op, case, dtype)
    exact, eager = run(op, op.reference, in_fp64(op, args)), run(op, op.reference, args)
    compare(run(op, fused_by(op, "triton"), args), eager, exact)


def check_memory(op: Op, case: Case) -> None:
    """Bounds, races, bytes; and the same bits whichever way round the programs run."""
    args = arguments(op, case, torch.float32)
    with memory_checked():
        first = run(op, fused_by(op, "triton"), args)
    with reversed_programs():
        second = run(op, fused_by(op, "triton"), args)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name}: depends on the order of the programs"
    with torch.no_grad(), memory_checked() as checker:
        op.fused(*case.make(torch.float32, CPU), provider="triton")
    touched, stated = checker.bytes_loaded + checker.bytes_stored, op.bytes_issued(*args)
    assert touched <= stated, f"forward loads and stores {touched} bytes; bytes_issued states {stated}"


class _Recorder(TorchDispatchMode):
    """Calls of this package's operators, as opcheck takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "iomm_kernels":
            self.calls.setdefault(func, pytree.tree_map(_detached, args))
        return func(*args, **(kwargs or {}))


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def check_registration(op: Op, case: Case) -> None:
    """opcheck of every torch.library operator behind this one, by Triton and by the CPU implementation;
    torch.compile of a call into one graph."""
    for provider in ("triton", "auto"):
        with _Recorder() as recorder:
            args = arguments(op, case, torch.float32)
            run(op, fused_by(op, "triton"), args)
        assert recorder.calls, f"{op.name} calls no operator of torch.library"
        for i, (func, call) in enumerate(recorder.calls.items()):
            inputs = [provider if a == "triton" else a for a in call]
            torch.testing.assert_close(func(*inputs), func(*call), rtol=1e-4, atol=1e-5, equal_nan=True)
            if i == 0:  # the public operator; its backward pass is not differentiated again
                for k, a in enumerate(inputs):
                    wanted = any(isinstance(args[d], Tensor) and _same(args[d], a) for d in op.differentiable)
                    inputs[k] = a.requires_grad_() if isinstance(a, Tensor) and wanted else a
            torch.library.opcheck(func, tuple(inputs))
    torch.compiler.reset()  # operators compiled before count towards dynamo's limit of recompilations
    compiled = torch.compile(fused_by(op, "triton"), fullgraph=True, backend="aot_eager")
    args = arguments(op, case, torch.float32)
    alone, together = (run(op, f, args) for f in (fused_by(op, "triton"), compiled))
    assert all(torch.equal(value, together[name]) for name, value in alone.items())


def _same(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def checks(op: Op) -> dict[str, Callable[[], None]]:
    """Everything that is checked of an operator, by its name in the results."""
    found: dict[str, Callable[[], None]] = {}
    for case in op.cases:
        found[f"{op.name} | {case.name} | parity"] = lambda case=case: check_parity(op, case)
        found[f"{op.name} | {case.name} | memory"] = lambda case=case: check_memory(op, case)
    second = op.cases[min(1, len(op.cases) - 1)]
    found[f"{op.name} | {second.name} | bf16"] = lambda: check_parity(op, second, torch.bfloat16)
    found[f"{op.name} | {second.name} | registration"] = lambda: check_registration(op, second)
    return found


def main(result: Path, names: list[str]) -> None:
    """Check the named operators (none: all) and write the results."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
    outcome = {}
    for op in iomm_kernels.OPS:
        if names and op.name not in names:
            continue
        for name, check in checks(op).items():
            try:
                check()
                outcome[name] = ""
            except Exception:  # noqa: BLE001  (the error is the result)
                outcome[name] = traceback.format_exc()
    result.write_text(json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
