"""What a table of names is: which of our weights hold the same numbers as which of a diffusers class's, and
how.

    Copy         one of ours is one of theirs
    Interleave   theirs q, k, v -> ours fused: rows run (head, q|k|v, channel), so that a tensor-parallel
                 rank's slice holds whole heads
    Columns      ours side by side are one of theirs: [attention | mlp] -> one matrix
    Permute      one of ours is one of theirs, in another order along one dimension
    Constant     theirs alone, what ours does not have: zeros, or a norm's weights of one

A table is a tuple of `Row`s: a row is a group of tensors that are made of each other and of nothing else.
Nothing here wants more than one row's tensors in memory: ask for one tensor, and hand over a function that
reads the few it is made of.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

Shape = tuple[int, ...]
Get = Callable[[str], Tensor]  # name -> the whole tensor


class Relation(Protocol):
    """How the tensors of a row relate; sequences are in the row's order."""

    def their_shapes(self, ours: Sequence[Shape]) -> tuple[Shape, ...]: ...

    def to_ours(self, index: int, theirs: Sequence[Tensor], ours: Sequence[Shape]) -> Tensor:
        """Our tensor number `index` of the row; `ours`: the shapes of all of ours."""
        ...

    def to_theirs(self, index: int, ours: Sequence[Tensor]) -> Tensor:
        """Their tensor number `index` of the row."""
        ...


@final
@dataclass(frozen=True)
class Copy:
    def their_shapes(self, ours: Sequence[Shape]) -> tuple[Shape, ...]:
        return tuple(ours)

    def to_ours(self, index: int, theirs: Sequence[Tensor], ours: Sequence[Shape]) -> Tensor:
        return theirs[index]

    def to_theirs(self, index: int, ours: Sequence[Tensor]) -> Tensor:
        return ours[index]


@final
@dataclass(frozen=True)
class Interleave:
    """One of ours, `parts` of theirs; our rows run (group, part, row in the group)."""

    group: int  # rows that stay together: the channels of a head
    parts: int = 3

    def their_shapes(self, ours: Sequence[Shape]) -> tuple[Shape, ...]:
        return ((ours[0][0] // self.parts, *ours[0][1:]),) * self.parts

    def to_ours(self, index: int, theirs: Sequence[Tensor], ours: Sequence[Shape]) -> Tensor:
        return torch.stack([part.unflatten(0, (-1, self.group)) for part in theirs], dim=1).flatten(0, 2)

    def to_theirs(self, index: int, ours: Sequence[Tensor]) -> Tensor:
        return ours[0].unflatten(0, (-1, self.parts, self.group))[:, index].flatten(0, 1)


@final
@dataclass(frozen=True)
class Columns:
    """Several of ours, one of theirs, which holds them side by side."""

    def their_shapes(self, ours: Sequence[Shape]) -> tuple[Shape, ...]:
        return ((ours[0][0], sum(shape[1] for shape in ours)),)

    def to_ours(self, index: int, theirs: Sequence[Tensor], ours: Sequence[Shape]) -> Tensor:
        return theirs[0].split([shape[1] for shape in ours], dim=1)[index]

    def to_theirs(self, index: int, ours: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(ours), dim=1)


@final
@dataclass(frozen=True)
class Permute:
    """One of ours, one of theirs: ours at `i` along `dim` is theirs at `order[i]`."""

    dim: int
    order: tuple[int, ...]

    def their_shapes(self, ours: Sequence[Shape]) -> tuple[Shape, ...]:
        return tuple(ours)

    def to_ours(self, index: int, theirs: Sequence[Tensor], ours: Sequence[Shape]) -> Tensor:
        return theirs[0].index_select(self.dim, torch.tensor(self.order, device=theirs[0].device))

    def to_theirs(self, index: int, ours: Sequence[Tensor]) -> Tensor:
        return ours[0].index_select(self.dim, torch.tensor(self.order, device=ours[0].device).argsort())


@final
@dataclass(frozen=True)
class Constant:
    """Nothing of ours, one value all over theirs. The row names one of ours, for dtype and device alone."""

    shape: Shape  # of theirs
    value: float = 0.0

    def their_shapes(self, ours: Sequence[Shape]) -> tuple[Shape, ...]:
        return (self.shape,)

    def to_ours(self, index: int, theirs: Sequence[Tensor], ours: Sequence[Shape]) -> Tensor:
        raise AssertionError("no tensor of ours is made of a constant")

    def to_theirs(self, index: int, ours: Sequence[Tensor]) -> Tensor:
        return ours[0].new_full(self.shape, self.value)


@final
@dataclass(frozen=True)
class Row:
    """Tensors of ours and of theirs that are made of each other. `{i}` in names: the number of a block."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of ours, whole (not a tensor-parallel slice)
    relation: Relation = Copy()
    split: int | None = None  # dimension of ours that tensor-parallel ranks share; None: each has the whole

    def block(self, i: int) -> "Row":
        """The row of block number i."""
        ours, theirs = (tuple(n.replace("{i}", str(i)) for n in names) for names in (self.ours, self.theirs))
        return replace(self, ours=ours, theirs=theirs)


def linear(
    ours: str,
    theirs: str | tuple[str, ...],
    out_size: int,
    in_size: int,
    relation: Relation | None = None,
    *,
    split: int | None = None,
    bias: bool = True,
) -> tuple[Row, ...]:
    """Rows of a linear layer. `split`: 0, its outputs are shared by ranks (column); 1, its inputs (row)."""
    relation = relation or Copy()
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    weight = Row(
        (f"{ours}.weight",), tuple(f"{n}.weight" for n in theirs), ((out_size, in_size),), relation, split
    )
    if not bias:
        return (weight,)
    bias_split = 0 if split == 0 else None  # a row-parallel layer adds its whole bias after the sum
    return weight, Row(
        (f"{ours}.bias",), tuple(f"{n}.bias" for n in theirs), ((out_size,),), relation, bias_split
    )


def vector(ours: str, theirs: str, size: int) -> Row:
    """Row of a norm's weight, or of any other vector that every rank has whole."""
    return Row((ours,), (theirs,), ((size,),))


def blocks(count: int, rows: Iterable[Row]) -> tuple[Row, ...]:
    """`rows` for block 0, then for block 1, ..."""
    rows = tuple(rows)
    return tuple(row.block(i) for i in range(count) for row in rows)


@final
class Table:
    """All names of one architecture, both ways. Every tensor is checked against its declared shape.

    Attributes:
        ours: our names and whole shapes, in the table's order.
        theirs: their names and shapes.
        constants: those of theirs that hold nothing of ours, and their value; `check_constant` what is read.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._ours: dict[str, tuple[Row, int]] = {}
        self._theirs: dict[str, tuple[Row, int]] = {}
        self.ours: dict[str, Shape] = {}
        self.theirs: dict[str, Shape] = {}
        self.constants: dict[str, float] = {}
        for row in rows:
            if isinstance(row.relation, Constant):
                self.constants.update(dict.fromkeys(row.theirs, row.relation.value))
            else:
                _add(self._ours, self.ours, row, row.ours, row.shapes)
            _add(self._theirs, self.theirs, row, row.theirs, row.relation.their_shapes(row.shapes))

    def needs_theirs(self, name: str) -> list[str]:
        """Those of theirs that our tensor `name` is made of."""
        return list(_find(self._ours, name, "our")[0].theirs)

    def needs_ours(self, name: str) -> list[str]:
        """Those of ours that their tensor `name` is made of (a constant: one that lends its dtype)."""
        return list(_find(self._theirs, name, "their")[0].ours)

    def to_ours(self, name: str, get: Get) -> Tensor:
        """Our whole tensor `name`; `get` reads theirs. It may share memory with what `get` returned.

        Raises:
            ValueError: an unknown name, or a tensor of another shape or of another dtype than its neighbours.
        """
        row, index = _find(self._ours, name, "our")
        theirs = _read(row.theirs, get, self.theirs)
        return row.relation.to_ours(index, theirs, row.shapes).contiguous()

    def to_theirs(self, name: str, get: Get) -> Tensor:
        """Their tensor `name`; `get` reads ours, whole. Otherwise as `to_ours`."""
        row, index = _find(self._theirs, name, "their")
        return row.relation.to_theirs(index, _read(row.ours, get, self.ours)).contiguous()

    def partition_dim(self, name: str) -> int | None:
        """The dimension of our tensor that tensor-parallel ranks share; None: every rank has it whole."""
        return _find(self._ours, name, "our")[0].split

    def slice(self, name: str, tensor: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """A tensor-parallel rank's part of our whole tensor `name`; a view.

        Raises:
            ValueError: the tensor does not divide over the ranks.
        """
        _check_shape(name, tensor, self.ours)
        dim = self.partition_dim(name)
        if dim is None:
            return tensor
        if tensor.shape[dim] % tp_size:
            raise ValueError(
                f"{name} has {tensor.shape[dim]} entries along dimension {dim}, which do not divide over "
                f"{tp_size} tensor-parallel ranks. Lower parallel.tp."
            )
        return tensor.chunk(tp_size, dim)[tp_rank]

    def check_constant(self, name: str, tensor: Tensor) -> None:
        """Refuse weights of theirs that ours has no place for.

        Raises:
            ValueError: `name` is one of `constants`, and the tensor has another value somewhere.
        """
        _check_shape(name, tensor, self.theirs)
        if name in self.constants and (tensor != self.constants[name]).any():
            raise ValueError(
                f"{name} is not {self.constants[name]:g} all over, but the model it is read into has no such "
                "weight. The folder's config.json and its weights do not belong together; export it again."
            )


def _add(
    index: dict[str, tuple[Row, int]],
    shapes: dict[str, Shape],
    row: Row,
    names: Sequence[str],
    row_shapes: Sequence[Shape],
) -> None:
    assert len(names) == len(row_shapes), f"{names}: {len(row_shapes)} shapes"
    for i, (name, shape) in enumerate(zip(names, row_shapes, strict=True)):
        assert name not in index, f"{name} is in two rows"
        index[name], shapes[name] = (row, i), shape


def _find(index: dict[str, tuple[Row, int]], name: str, whose: str) -> tuple[Row, int]:
    if name not in index:
        near = difflib.get_close_matches(name, index, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"the table has no tensor {name} among {whose} names.{hint}")
    return index[name]


def _read(names: Sequence[str], get: Get, shapes: dict[str, Shape]) -> list[Tensor]:
    tensors = [get(name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        _check_shape(name, tensor, shapes)
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, {names[0]} is {tensors[0].dtype}. They are parts of one weight; "
                "convert them to one dtype."
            )
    return tensors


def _check_shape(name: str, tensor: Tensor, shapes: dict[str, Shape]) -> None:
    if tuple(tensor.shape) != shapes[name]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, the architecture asks for {shapes[name]}. "
            "The weights and the configuration do not belong together."
        )


def stock_settings(
    theirs: Mapping[str, Any], defaults: Mapping[str, Any], their_class: str
) -> dict[str, Any]:
    """The settings of a config.json, with the stock class's defaults where it says nothing.

    Raises:
        ValueError: settings that the stock class does not take.
    """
    public = {key: value for key, value in theirs.items() if not key.startswith("_")}
    if unknown := sorted(public.keys() - defaults.keys()):
        raise ValueError(
            f"config.json of the {their_class} has {', '.join(unknown)}, which that class does not "
            "take. Only unquantised models of the stock class can be imported."
        )
    return {**defaults, **public}
