"""From "where does each element come from" to strided pieces."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_refit.plan.trace.codes import FOREIGN, PADDING, Numbers
from onnx_refit.plan.trace.recipes import Gather, Operand, Piece, Recipe, Walk, c_strides
from onnx_refit.tensors import TensorSpec

Lookup = Callable[[int], int]
"""Flat position -> number of the element that lies there."""
_MOST_PIECES = 64
_BLOCKS = (16, 8)


@dataclass(frozen=True)
class Numbering:
    """Which tensor each number belongs to: consecutive numbers, tensor after tensor.

    Attributes:
        names: the tensors.
        starts: the first number of each, and the end of the last: one longer than ``names``.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(specs: Sequence[TensorSpec]) -> Numbering:
        """The numbering of these tensors in this order."""
        starts = [0]
        for spec in specs:
            starts.append(starts[-1] + spec.size)
        return Numbering(tuple(spec.name for spec in specs), tuple(starts))

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return self.starts[-1]

    def owner(self, number: int) -> int:
        """Index of the tensor that a number belongs to (the last one that starts there, if some are empty)."""
        return bisect_right(self.starts, number) - 1


def quick(spec: TensorSpec, lookup: Lookup, numbering: Numbering) -> Recipe | None:
    """A recipe guessed from few elements: one piece, one source, no padding. To be proved by the caller."""
    size = spec.size
    if size == 0:
        return Recipe(spec, ())
    first = lookup(0)
    if first < 0:
        return None
    owner = numbering.owner(first)
    factored = _factor(lookup, size)
    if factored is None:
        return None
    dims, strides = factored
    start = numbering.starts[owner]
    low = first - start + sum((d - 1) * min(0, s) for d, s in zip(dims, strides, strict=True))
    high = first - start + sum((d - 1) * max(0, s) for d, s in zip(dims, strides, strict=True))
    if low < 0 or high >= numbering.starts[owner + 1] - start:
        return None
    operand = Operand(numbering.names[owner], Walk(first - start, strides))
    return Recipe(spec, (Piece(dims, Walk(0, c_strides(dims)), (operand,)),))


def _factor(lookup: Lookup, size: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    dims: list[int] = []
    strides: list[int] = []
    step, count = 1, size

    def at(index: int) -> int:
        return lookup(index * step)

    while count > 1:
        origin = at(0)
        stride = at(1) - origin

        def fits(run: int, origin: int = origin, stride: int = stride) -> bool:
            return at(run - 1) == origin + (run - 1) * stride

        good, bad = 2, None
        while good < count:
            longer = min(count, good * 2)
            if not fits(longer):
                bad = longer
                break
            good = longer
        while bad is not None and bad - good > 1:
            middle = (good + bad) // 2
            if fits(middle):
                good = middle
            else:
                bad = middle
        if count % good:
            return None
        dims.append(good)
        strides.append(stride)
        step *= good
        count //= good
    if not dims:
        return (1,), (0,)
    return tuple(reversed(dims)), tuple(reversed(strides))


def thorough(spec: TensorSpec, numbers: Numbers, numbering: Numbering) -> Recipe | None:
    """A recipe from all the numbers: pieces where boxes of strides fit, gathers elsewhere; None for foreign values."""
    shape = spec.static_shape or (1,)
    if (numbers == FOREIGN).any():
        return None
    grid = numbers.reshape(shape)
    pieces: list[Piece] = []
    gathers: list[Gather] = []
    for found in _explain(grid, Walk(0, c_strides(shape)), numbering, top=True):
        (pieces if isinstance(found, Piece) else gathers).append(found)  # type: ignore[arg-type]
    return Recipe(spec, tuple(pieces), tuple(gathers))


def _explain(grid: Numbers, target: Walk, numbering: Numbering, *, top: bool = False) -> Iterator[Piece | Gather]:
    mask = grid != PADDING
    if not mask.any():
        return
    starts = np.asarray(numbering.starts[:-1])
    owners = np.where(mask, np.searchsorted(starts, grid, side="right") - 1, -1)
    present = np.unique(owners[mask])
    if len(present) > 1:
        axis, cuts = _cuts_by_owner(owners)
        if axis is not None:
            yield from _slices(grid, target, numbering, axis, cuts)
            return
        yield from _gathered(grid, target, numbering, owners)
        return
    name, start = numbering.names[present[0]], int(starts[present[0]])
    local = np.where(mask, grid - start, 0)
    for dims, walk in _shapes(grid.shape, target, top=top):
        boxes = _strided(local.reshape(dims), mask.reshape(dims), walk, name)
        if boxes is not None:
            yield from boxes
            return
    axis, cuts = _cuts_by_step(grid)
    if axis is not None and grid.size >= 512 * len(cuts):
        yield from _slices(grid, target, numbering, axis, cuts)
        return
    yield from _gathered(grid, target, numbering, owners)


def _shapes(shape: tuple[int, ...], target: Walk, *, top: bool) -> Iterator[tuple[tuple[int, ...], Walk]]:
    """The shape itself, and for convolution weights the blocked shapes that the same bytes may have."""
    yield shape, target
    if top and len(shape) == 4:
        out, into, height, width = shape
        for block in _BLOCKS:
            for dims in (
                (out // block, into // block, height, width, block, block),
                (out // block, into, height, width, block),
            ):
                if math.prod(dims) == math.prod(shape):
                    yield dims, Walk(0, c_strides(dims))
    if top and len(shape) == 1:
        for block in _BLOCKS:
            if shape[0] % block == 0:
                yield (shape[0] // block, block), Walk(0, (block, 1))


def _strided(local: Numbers, mask: np.typing.NDArray[np.bool_], target: Walk, name: str) -> list[Piece] | None:
    """Boxes of the mask, all read with one set of strides; None if there is no such set or there are many boxes."""
    dims = local.shape
    strides = []
    for axis in range(len(dims)):
        values, valid = np.moveaxis(local, axis, 0), np.moveaxis(mask, axis, 0)
        if len(values) < 2:
            strides.append(0)
            continue
        both = (valid[0] & valid[1]).reshape(-1)
        at = int(np.argmax(both))
        strides.append(int(values[1].reshape(-1)[at] - values[0].reshape(-1)[at]) if both[at] else 0)
    corner = np.unravel_index(int(np.argmax(mask)), dims)
    offset = int(local[corner]) - sum(int(i) * s for i, s in zip(corner, strides, strict=True))
    predicted = np.asarray(offset, np.int64)
    for axis, (extent, stride) in enumerate(zip(dims, strides, strict=True)):
        line = np.arange(extent, dtype=np.int64) * stride
        predicted = predicted + line.reshape([-1] + [1] * (len(dims) - 1 - axis))
    if not (predicted == local)[mask].all():
        return None
    boxes = _boxes(mask)
    if len(boxes) > _MOST_PIECES:
        return None
    pieces = []
    for box in boxes:
        extents = tuple(b - a for a, b in box)
        begin = sum(a * s for (a, _), s in zip(box, target.strides, strict=True))
        read = sum(a * s for (a, _), s in zip(box, strides, strict=True))
        operand = Operand(name, Walk(offset + read, tuple(strides)))
        pieces.append(Piece(extents, Walk(target.offset + begin, target.strides), (operand,)))
    return pieces


def _boxes(mask: np.typing.NDArray[np.bool_]) -> list[tuple[tuple[int, int], ...]]:
    if mask.all():
        return [tuple((0, extent) for extent in mask.shape)]
    if not mask.any():
        return []
    rows = mask.reshape(mask.shape[0], -1)
    found: list[tuple[tuple[int, int], ...]] = []
    for begin, end in _runs(np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)), len(rows)):
        inner = _boxes(mask[begin]) if mask.ndim > 1 else ([()] if mask[begin] else [])
        found += [((begin, end), *box) for box in inner]
        if len(found) > _MOST_PIECES:
            break
    return found


def _runs(changes: Numbers, length: int) -> list[tuple[int, int]]:
    cuts = [0, *(int(i) + 1 for i in changes), length]
    return list(itertools.pairwise(cuts))


def _cuts_by_owner(owners: Numbers) -> tuple[int | None, list[tuple[int, int]]]:
    for axis, extent in enumerate(owners.shape):
        lines = np.moveaxis(owners, axis, 0).reshape(extent, -1)
        if (lines == lines[:, :1]).all():
            runs = _runs(np.flatnonzero(lines[1:, 0] != lines[:-1, 0]), extent)
            if 1 < len(runs) <= 4 * _MOST_PIECES:
                return axis, runs
    # Owners that differ within every line: cut where the pattern of owners changes.
    for axis, extent in enumerate(owners.shape):
        lines = np.moveaxis(owners, axis, 0).reshape(extent, -1)
        runs = _runs(np.flatnonzero((lines[1:] != lines[:-1]).any(axis=1)), extent)
        if 1 < len(runs) <= _MOST_PIECES:
            return axis, runs
    return None, []


def _cuts_by_step(grid: Numbers) -> tuple[int | None, list[tuple[int, int]]]:
    """Where, along some axis, the regular step from slice to slice breaks (LSTM gates, concatenated slices)."""
    for axis, extent in enumerate(grid.shape):
        if extent < 2:
            continue
        lines = np.moveaxis(grid, axis, 0).reshape(extent, -1)
        steps = lines[1:] - lines[:-1]
        usual = np.median(steps[:, 0])
        irregular = (steps != usual).any(axis=1)
        runs = _runs(np.flatnonzero(irregular), extent) if extent > 2 else [(0, 1), (1, 2)]
        if 1 < len(runs) <= _MOST_PIECES:
            return axis, runs
    return None, []


def _slices(
    grid: Numbers, target: Walk, numbering: Numbering, axis: int, cuts: list[tuple[int, int]]
) -> Iterator[Piece | Gather]:
    for begin, end in cuts:
        part = np.ascontiguousarray(grid[(slice(None),) * axis + (slice(begin, end),)])
        walk = Walk(target.offset + begin * target.strides[axis], target.strides)
        yield from _explain(part, walk, numbering)


def _gathered(grid: Numbers, target: Walk, numbering: Numbering, owners: Numbers) -> Iterator[Gather]:
    positions = np.full(grid.shape, target.offset, np.int64)
    for axis, (extent, stride) in enumerate(zip(grid.shape, target.strides, strict=True)):
        positions += (np.arange(extent, dtype=np.int64) * stride).reshape([-1] + [1] * (grid.ndim - 1 - axis))
    for owner in np.unique(owners[owners >= 0]):
        chosen = owners == owner
        yield Gather(numbering.names[owner], positions[chosen], grid[chosen] - numbering.starts[owner])
