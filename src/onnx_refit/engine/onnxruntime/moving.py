"""One engine weight's recipe compiled into moves of native code (``onnx_refit.moves``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from onnx_refit.moves.library import GATHER, LOOK, NOWHERE, RANK, ROWS, TILES, WALK
from onnx_refit.plan.trace.recipes import Gather, Piece, Recipe, Walk
from onnx_refit.tensors import Array, numpy_dtype

SPLIT = 1 << 16  # elements; what is looked at is still in the second-level cache when it is moved
_LANES = 16
_ROWS_TOGETHER = 16
_NARROW = 64
_TABLE = 4096
_WORD = 4  # bytes
_SIZES = frozenset({1, 2, 4, 8})
_EXPONENTS = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,  # it has no infinities: all these bits set are NaN
    "float8_e5m2": 0x7C,
}
"""Bits that are all set in what is not finite, and in nothing else."""

Row = tuple[Any, ...]
"""A move, field by field."""


class Slots:
    """Names of addresses, numbered as they are first asked for; slot 0 is nowhere."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {"": NOWHERE}

    def __getitem__(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


@dataclass(frozen=True)
class Unit:
    """What one thread does in one go.

    Attributes:
        rows: its moves.
        elements: how many it writes, or looks at.
        begins: tensor -> the first of its elements that are read here.
        held: arrays whose addresses are in the moves.
    """

    rows: tuple[Row, ...]
    elements: int
    begins: Mapping[str, int]
    held: tuple[Array, ...] = ()


@dataclass(frozen=True)
class _Axis:
    """One dimension of a box: extent, and strides in target, source and factor, in elements."""

    extent: int
    target: int
    source: int
    factor: int


@dataclass(frozen=True)
class _Box:
    """A piece in the making: axes from the largest stride of the target to the smallest."""

    axes: tuple[_Axis, ...]
    target: int
    source: int
    factor: int
    source_name: str
    factor_name: str | None

    @property
    def size(self) -> int:
        return math.prod(axis.extent for axis in self.axes)

    def part(self, position: int, begin: int, count: int) -> _Box:
        """The box restricted along one of its axes."""
        axis = self.axes[position]
        return replace(
            self,
            axes=(*self.axes[:position], replace(axis, extent=count), *self.axes[position + 1 :]),
            target=self.target + begin * axis.target,
            source=self.source + begin * axis.source,
            factor=self.factor + begin * axis.factor,
        )


def units(
    recipe: Recipe,
    dtypes: Mapping[str, np.dtype[np.generic]],
    sizes: Mapping[str, int],
    target: str,
    slots: Slots,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Unit, ...] | None:
    """What writes a tensor; None where that takes more than moving elements of its own dtype, and float32 products.

    Args:
        recipe: what the tensor is.
        dtypes: of the tensors that the recipe reads.
        sizes: elements of these.
        target: the tensor's slot.
        slots: numbers the slots; every tensor that is read has one of its own name.
        flags: tensor -> the slot of its flag: it is looked at while it is moved (see ``covers``).
    """
    kinds = {dtypes[name] for name in recipe.sources}
    if len(kinds) > 1:
        return None
    dtype = next(iter(kinds), np.dtype(np.float32))
    scaled = any(len(piece.operands) > 1 for piece in recipe.pieces)
    if (
        dtype != numpy_dtype(recipe.spec.dtype)
        or dtype.hasobject
        or dtype.itemsize not in _SIZES
        or (scaled and dtype != np.float32)
    ):
        return None
    found: list[Unit] = []
    for piece in recipe.pieces:
        made = _boxed(piece, recipe.spec.size, sizes)
        if made is None:
            return None
        for box in _split(made):
            written = _written(box, dtype, slots[target], slots[flags.get(box.source_name, "")], slots)
            if written is None:
                return None
            found.append(written)
    for gather in recipe.gathers:
        if not _inside(gather, recipe.spec.size, sizes[gather.source]):
            return None
        found.append(_gathered(gather, dtype.itemsize, slots[target], slots))
    return tuple(found)


def look_slots(name: str) -> tuple[str, str, str]:
    """The slots of a source that is looked at: where it is, where a copy is kept, where to say what is not finite."""
    return f"look:{name}", f"keep:{name}", f"flag:{name}"


def watchable(dtype: np.dtype[np.generic]) -> bool:
    """Whether native code can look at such a tensor."""
    return dtype.name in _EXPONENTS or (dtype.kind in "biu" and dtype.itemsize in _SIZES)


def look(name: str, dtype: np.dtype[np.generic], begin: int, end: int, slots: Slots) -> Row:
    """The move that looks at some elements of a source."""
    source, keep, flag = look_slots(name)
    exponent = _EXPONENTS.get(dtype.name, 0)
    return _row(
        LOOK,
        dtype.itemsize,
        (slots[keep], 0),
        (slots[source], begin),
        flag=slots[flag],
        take=exponent,
        first=end - begin,
    )


def looks(name: str, dtype: np.dtype[np.generic], size: int, slots: Slots) -> tuple[Unit, ...]:
    """What looks at a whole source."""
    ends = [(begin, min(size, begin + SPLIT)) for begin in range(0, size, SPLIT)]
    return tuple(Unit((look(name, dtype, begin, end, slots),), end - begin, {}) for begin, end in ends)


def looking(
    parts: Sequence[Unit], source: str, name: str, dtype: np.dtype[np.generic], size: int, slots: Slots
) -> tuple[Unit, ...]:
    """The same units, each looking first at the elements of a source that it reads, roughly; each element once.

    Args:
        parts: units, some of which move it; where none does, others are added that look.
        source: the tensor's name in the recipes.
        name: the source weight's own.
        dtype: its dtype.
        size: its elements.
        slots: numbers the slots.
    """
    readers = [k for k, part in enumerate(parts) if source in part.begins]
    readers.sort(key=lambda k: parts[k].begins[source])
    if not readers:  # it only scales another one
        return (*parts, *looks(name, dtype, size, slots))
    begins = [0, *(parts[k].begins[source] for k in readers[1:]), size]
    done = list(parts)
    for k, begin, end in zip(readers, begins, begins[1:], strict=False):
        if begin < end:
            done[k] = replace(parts[k], rows=(look(name, dtype, begin, end, slots), *parts[k].rows))
    return tuple(done)


def _boxed(piece: Piece, target_size: int, sizes: Mapping[str, int]) -> _Box | None:
    """The piece with its axes sorted and joined; None where it leaves a tensor, or a form that moves have."""
    operands = piece.operands
    if len(operands) > 2 or not all(piece.dims):
        return None
    source = operands[0]
    factor = operands[1] if len(operands) == 2 else None
    if factor is not None and _reach(piece.dims, factor.walk) > _reach(piece.dims, source.walk):
        source, factor = factor, source  # the tensor with more elements is what is moved
    inside = _within(piece.dims, piece.target, target_size)
    for operand in operands:
        inside = inside and _within(piece.dims, operand.walk, sizes[operand.name])
    if not inside:
        return None
    none = Walk(0, (0,) * len(piece.dims))
    walk = none if factor is None else factor.walk
    strides = zip(piece.dims, piece.target.strides, source.walk.strides, walk.strides, strict=True)
    axes = sorted((_Axis(*each) for each in strides if each[0] > 1), key=lambda axis: -axis.target)
    if any(axis.target <= 0 for axis in axes):
        return None
    joined: list[_Axis] = []
    for axis in axes:
        if joined and _continues(joined[-1], axis):
            joined[-1] = replace(axis, extent=joined[-1].extent * axis.extent)
        else:
            joined.append(axis)
    name = None if factor is None else factor.name
    return _Box(tuple(joined), piece.target.offset, source.walk.offset, walk.offset, source.name, name)


def _continues(outer: _Axis, inner: _Axis) -> bool:
    """Whether the inner axis' end is where the outer one goes on, in all three tensors."""
    n = inner.extent
    return (outer.target, outer.source, outer.factor) == (n * inner.target, n * inner.source, n * inner.factor)


def _reach(dims: tuple[int, ...], walk: Walk) -> int:
    """How many different elements a walk visits, at most."""
    return math.prod(d for d, stride in zip(dims, walk.strides, strict=True) if stride)


def _within(dims: tuple[int, ...], walk: Walk, size: int) -> bool:
    """Whether a walk stays inside a tensor of so many elements."""
    steps = [(d - 1) * stride for d, stride in zip(dims, walk.strides, strict=True)]
    low = walk.offset + sum(step for step in steps if step < 0)
    high = walk.offset + sum(step for step in steps if step > 0)
    return low >= 0 and high < size


def _inside(gather: Gather, target_size: int, source_size: int) -> bool:
    """Whether a gather stays inside its tensors."""
    if gather.to.size != gather.take.size:
        return False
    pairs = ((gather.to, target_size), (gather.take, source_size))
    return all(not p.size or (int(p.min()) >= 0 and int(p.max()) < size) for p, size in pairs)


def _split(box: _Box) -> Iterator[_Box]:
    """The box in parts of about ``SPLIT`` elements, along the axis that is the slowest in the source."""
    size = box.size
    if size <= SPLIT + SPLIT // 2:
        yield from _banded(box)
        return
    order = sorted(range(len(box.axes)), key=lambda k: -abs(box.axes[k].source))
    for position in order:
        extent = box.axes[position].extent
        last = position == len(box.axes) - 1
        grain = _LANES * (64 if box.axes[position].source == 1 else 1) if last else 1
        step = max(1, extent * SPLIT // size)
        step = -(-step // grain) * grain
        if step < extent:
            for begin in range(0, extent, step):
                yield from _split(box.part(position, begin, min(step, extent - begin)))
            return
    yield from _banded(box)


def _banded(box: _Box) -> Iterator[_Box]:
    """Narrow rows out of wide ones: some rows at a time, so that a line of the cache is used up while it is there."""
    axes = box.axes
    if len(axes) >= 3 and axes[-1].target == axes[-1].source == 1 and axes[-1].extent <= _NARROW:
        down, width = axes[-2], axes[-1].extent
        beside = [k for k, axis in enumerate(axes[:-2]) if axis.source == width]
        if beside and down.source > width and down.extent > _ROWS_TOGETHER and len(axes) < RANK:
            whole = down.extent // _ROWS_TOGETHER
            rest = down.extent - whole * _ROWS_TOGETHER
            main = box.part(len(axes) - 2, 0, whole * _ROWS_TOGETHER)
            bands = _Axis(whole, *(_ROWS_TOGETHER * s for s in (down.target, down.source, down.factor)))
            yield replace(main, axes=(bands, *axes[:-2], replace(down, extent=_ROWS_TOGETHER), axes[-1]))
            if rest:
                yield box.part(len(axes) - 2, whole * _ROWS_TOGETHER, rest)
            return
    yield box


def _written(box: _Box, dtype: np.dtype[np.generic], target: int, flag: int, slots: Slots) -> Unit | None:
    """The move of a box; None where it has more axes than a move has."""
    axes = list(box.axes) or [_Axis(1, 1, 1, 0)]
    inner = axes.pop()
    kind, inners, table = WALK, [inner], None
    if inner.target == inner.source == 1:
        kind = ROWS
    elif inner.target == 1 and dtype.itemsize == _WORD:
        run = next((axis for axis in axes if axis.source == 1 and not axis.factor), None)
        if run is not None:
            kind = TILES
            axes.remove(run)
            more = next((a for a in axes if a.source == run.extent and not a.factor), None)
            if more is not None and more.extent * run.extent <= _TABLE:
                axes.remove(more)
                steps = np.arange(more.extent)[:, None] * more.target + np.arange(run.extent) * run.target
                table = np.ascontiguousarray(steps.reshape(-1), np.int64)
                run = _Axis(table.size, 0, 1, 0)
            inners = [run, inner]
    if len(axes) + len(inners) > RANK:
        return None
    padding = [_Axis(1, 0, 0, 0)] * (RANK - len(axes) - len(inners))
    every = [*padding, *axes, *inners]
    low = box.source + sum(min(0, (axis.extent - 1) * axis.source) for axis in box.axes)
    begins = {box.source_name: low}
    row = _row(
        kind,
        dtype.itemsize,
        (target, box.target),
        (slots[box.source_name], box.source),
        (-1, 0) if box.factor_name is None else (slots[box.factor_name], box.factor),
        to=0 if table is None else table.ctypes.data,
        take=_EXPONENTS.get(dtype.name, 0),
        flag=flag,
        lines=int(_lines(box, axes, inners, table)),
        axes=every,
    )
    return Unit((row,), box.size, begins, () if table is None else (table,))


def _lines(box: _Box, outer: Sequence[_Axis], inners: Sequence[_Axis], table: Array | None) -> bool:
    """Whether whole lines of the cache are written, from their beginnings: 16 elements, or 8 and the next 8 at once."""
    width = inners[-1].extent
    starts = [box.target, *(axis.target for axis in outer)]
    if len(inners) == 2:
        starts += [inners[0].target] if table is None else table.tolist()
    if width == 8 and len(inners) == 2 and table is None:
        return inners[0].target == 8 and all(start % 8 == 0 for start in starts)
    return width % _LANES == 0 and all(start % _LANES == 0 for start in starts)


def _gathered(gather: Gather, itemsize: int, target: int, slots: Slots) -> Unit:
    to, take = (np.ascontiguousarray(positions, np.int64) for positions in (gather.to, gather.take))
    row = _row(
        GATHER,
        itemsize,
        (target, 0),
        (slots[gather.source], 0),
        to=to.ctypes.data,
        take=take.ctypes.data,
        first=to.size,
    )
    begins = {gather.source: int(take.min())} if take.size else {}
    return Unit((row,), int(to.size), begins, (to, take))


def _row(
    kind: int,
    itemsize: int,
    target: tuple[int, int],
    source: tuple[int, int],
    factor: tuple[int, int] = (-1, 0),
    *,
    flag: int = NOWHERE,
    to: int = 0,
    take: int = 0,
    lines: int = 0,
    first: int = 1,
    axes: Sequence[_Axis] = (_Axis(1, 0, 0, 0),) * RANK,
) -> Row:
    """A move; places are (slot, offset)."""
    dims = (first, *(axis.extent for axis in axes[1:])) if first != 1 else tuple(axis.extent for axis in axes)
    return (
        kind,
        itemsize,
        target[0],
        source[0],
        factor[0],
        flag,
        target[1],
        source[1],
        factor[1],
        to,
        take,
        lines,
        dims,
        tuple(axis.target for axis in axes),
        tuple(axis.source for axis in axes),
        tuple(axis.factor for axis in axes),
    )
