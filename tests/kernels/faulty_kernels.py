"""Kernels with faults, run under the memory checker. A script: TRITON_INTERPRET=1, prints a line a kernel."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from triton.runtime.errors import InterpreterError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "kernels")]

from memcheck import memory_checked, reversed_programs  # noqa: E402

from iomm_kernels.launch import jit, tl  # noqa: E402


@jit
def copy(x, y, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@jit
def add(x, y, N: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, N))))


@jit
def last(y):
    tl.store(y, tl.program_id(0))


@jit
def shift(y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at + N, tl.load(y + at))


def fault(call: Callable[[], object]) -> str:
    """What the checker says."""
    try:
        with memory_checked():
            call()
    except InterpreterError as error:
        return str(error)
    return "no fault"


def say(name: str, *values: object) -> None:
    sys.stdout.write(f"{name}: {' '.join(map(str, values))}\n")


x, y = torch.arange(8.0), torch.zeros(8)
say("clean", fault(lambda: copy[(2,)](x, y, 8, N=4)))
say("beyond", fault(lambda: copy[(3,)](x, y, 12, N=4)))
say("gap", fault(lambda: copy[(1,)](x, torch.zeros(2, 8)[:, :3], 4, N=4)))
say("race", fault(lambda: last[(2,)](y)))
say("read", fault(lambda: shift[(2,)](torch.zeros(12), N=4)))
say("atomic", fault(lambda: add[(2,)](x, y, N=8)))
with memory_checked() as checker:
    copy[(2,)](x, y, 7, N=4)
say("bytes", checker.bytes_loaded, checker.bytes_stored, checker.launches)
z = torch.zeros(1, dtype=torch.int32)
with reversed_programs():
    last[(3,)](z)
say("reversed", z.item())
