"""A memory checker over Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported).

Finds, in every launch inside `memory_checked()`:
    - accesses outside the elements of the tensor arguments, gaps between strided rows included
    - races: an address that one program stores to and another program loads or stores
    - atomic additions of floats, whose order, and so whose result, is not fixed
It also counts the bytes loaded and stored, an address once in each access of a program.
`reversed_programs()` runs the programs of a launch last to first: a result that changes depended on their
order.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class MemoryFault(AssertionError):
    """An access that is wrong on a GPU, though the interpreter may get away with it."""


class _Region:
    """The storage behind one or more tensor arguments: a state for each byte."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, size = storage.data_ptr(), storage.nbytes()
        self.inside = np.zeros(size, bool)
        self.writer = np.full(size, NOBODY, np.int32)
        self.reader = np.full(size, NOBODY, np.int32)
        self.tensors: list[tuple[str, int, int]] = []  # name, first byte, bytes an element

    def add(self, name: str, tensor: torch.Tensor) -> None:
        inside = torch.zeros(len(self.inside) // tensor.element_size(), dtype=torch.bool)
        inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        flags = inside.numpy().repeat(tensor.element_size())
        self.inside[: len(flags)] |= flags
        self.tensors.append((name, tensor.data_ptr() - self.start, tensor.element_size()))


@dataclass
class Checker:
    """State of the launch under way, and byte counts of all launches."""

    kernel: str = ""
    regions: list[_Region] = field(default_factory=list)
    bytes_loaded: int = 0
    bytes_stored: int = 0
    launches: int = 0

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        regions: dict[int, _Region] = {}
        for name, value in arguments.items():
            tensor = getattr(value, "base", value)  # a tensor descriptor has one
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                storage = tensor.untyped_storage()
                regions.setdefault(storage.data_ptr(), _Region(storage)).add(name, tensor)
        self.kernel, self.regions = kernel, list(regions.values())
        self.launches += 1

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        """Check the lanes that `mask` lets through, then note who touched what."""
        address = np.asarray(pointers.data, np.int64)
        lanes = np.broadcast_to(True if mask is None else np.asarray(mask.data, bool), address.shape)
        address = address[lanes]
        if not address.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        distinct = np.unique(address).size * size
        self.bytes_loaded += distinct if kind != "store" else 0
        self.bytes_stored += distinct if kind != "load" else 0
        seen = np.zeros(address.shape, bool)
        for region in self.regions:
            at = address - region.start
            here = (at >= 0) & (at + size <= len(region.inside))
            seen |= here
            self._check_region(kind, region, at[here], size)
        if not seen.all():
            self._fail(f"{kind} outside of every tensor argument, {(~seen).sum()} lanes")

    def _check_region(self, kind: str, region: _Region, at: Any, size: int) -> None:
        byte = at[:, None] + np.arange(size)
        if not region.inside[byte].all():
            bad = int(at[~region.inside[byte].all(axis=1)][0])
            where = " or ".join(f"{name}[{(bad - first) / item:g}]" for name, first, item in region.tensors)
            self._fail(f"{kind} between or beyond the elements, at flat index {where}")
        x, y, z = interpreter.interpreter_builder.grid_idx
        dim = interpreter.interpreter_builder.grid_dim
        program = (x * dim[1] + y) * dim[2] + z
        names = ", ".join(name for name, _, _ in region.tensors)
        others = region.writer[byte]
        if kind != "atomic" and ((others != NOBODY) & (others != program)).any():
            self._fail(f"{kind} in {names} where program {others[others != NOBODY][0]} stores too: a race")
        if kind == "load":
            reader = region.reader[byte]
            region.reader[byte] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
            return
        readers = region.reader[byte]
        if ((readers != NOBODY) & (readers != program)).any():
            self._fail(f"{kind} in {names} where another program loads: a race")
        region.writer[byte] = SEVERAL if kind == "atomic" else program

    def _fail(self, what: str) -> None:
        raise MemoryFault(f"{self.kernel}, program {interpreter.interpreter_builder.grid_idx}: {what}")


@contextlib.contextmanager
def memory_checked() -> Iterator[Checker]:
    """Every launch inside is checked; faults come as triton's InterpreterError with a MemoryFault's text."""
    builder, executor, checker = interpreter.InterpreterBuilder, interpreter.GridExecutor, Checker()
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, arguments = builder.create_atomic_rmw, builder.create_atomic_cas, executor._init_args_hst

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        checker.access("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        checker.access("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def checked_rmw(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if "fadd" in str(kind).lower():
            checker._fail("atomic addition of floats: the order of the sum is not fixed")
        checker.access("atomic", pointers, mask)
        return rmw(self, kind, pointers, value, mask, *rest)

    def checked_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        checker.access("atomic", pointers, None)
        return cas(self, pointers, *rest)

    def begin(self: Any, positional: Any, named: Any) -> Any:
        host = arguments(self, positional, named)
        given = dict(zip(self.arg_names, host[0], strict=False)) | host[1]
        checker.begin(self.fn.__name__, given)
        return host

    changes = {
        "create_masked_load": checked_load,
        "create_masked_store": checked_store,
        "create_atomic_rmw": checked_rmw,
        "create_atomic_cas": checked_cas,
    }
    with contextlib.ExitStack() as stack:
        for name, function in changes.items():
            stack.enter_context(_replaced(builder, name, function))
        stack.enter_context(_replaced(executor, "_init_args_hst", begin))
        yield checker


@contextlib.contextmanager
def reversed_programs() -> Iterator[None]:
    """Programs of a launch run last to first."""
    builder = interpreter.InterpreterBuilder
    original = builder.set_grid_idx

    def from_the_end(self: Any, x: int, y: int, z: int) -> None:
        dim = self.grid_dim
        original(self, dim[0] - 1 - x, dim[1] - 1 - y, dim[2] - 1 - z)

    with _replaced(builder, "set_grid_idx", from_the_end):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
