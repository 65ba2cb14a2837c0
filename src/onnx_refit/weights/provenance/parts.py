"""Weights that are several checkpoint tensors side by side, or a piece of one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnx_refit.tensors import Array
from onnx_refit.weights.provenance.bits import as_bits, permutations
from onnx_refit.weights.provenance.expression import Concat, Expression, Slice, Stored, Transpose
from onnx_refit.weights.provenance.pool import Pool
from onnx_refit.weights.scan import same_bits

_MAX_OPTIONS = 16  # equal tensors that are followed at each step
_MAX_PARTS = 64


@dataclass(frozen=True, slots=True)
class _Layout:
    """A checkpoint tensor, its axes in some order."""

    expression: Expression
    array: Array


def _layouts(pool: Pool, name: str, shape: tuple[int, ...]) -> Iterator[_Layout]:
    array = pool.read(name)
    yield _Layout(Stored(name), array)
    for perm in permutations(shape):
        yield _Layout(Transpose(Stored(name), perm), array.transpose(perm))


def _fitting(pool: Pool, wanted: Array, axis: int, *, larger: bool) -> Iterator[_Layout]:
    """The tensors that agree with a weight in all axes but one, where they are larger or smaller."""
    rest = wanted.shape[:axis] + wanted.shape[axis + 1 :]
    key = sorted(rest)
    for name, shape in pool.of_dtype(wanted.dtype):
        if len(shape) != wanted.ndim or not _contains(sorted(shape), key):
            continue
        for layout in _layouts(pool, name, shape):
            there = layout.array.shape
            if there[:axis] + there[axis + 1 :] != rest or there[axis] == 0:
                continue
            if (there[axis] > wanted.shape[axis]) if larger else (there[axis] < wanted.shape[axis]):
                yield layout


def _contains(shape: list[int], rest: list[int]) -> bool:
    remaining = list(shape)
    for dimension in rest:
        if dimension not in remaining:
            return False
        remaining.remove(dimension)
    return True


def _cut(array: Array, axis: int, start: int, stop: int) -> Array:
    return array[(slice(None),) * axis + (slice(start, stop),)]


def find_concatenations(pool: Pool, wanted: Array) -> list[Expression]:
    """The ways in which a weight is two or more checkpoint tensors side by side along an axis, bit for bit."""
    found: list[Expression] = []
    for axis in range(wanted.ndim):
        if wanted.shape[axis] < 2:
            continue
        by_first: dict[bytes, list[_Layout]] = defaultdict(list)
        for layout in _fitting(pool, wanted, axis, larger=False):
            by_first[_head(layout.array, axis, 0)].append(layout)
        if by_first:
            for parts in _walk(wanted, axis, 0, by_first, ()):
                found.append(Concat(parts, axis))
                if len(found) >= _MAX_OPTIONS:
                    return found
        if found:
            return found
    return found


def _head(array: Array, axis: int, start: int) -> bytes:
    """A few elements at a position along an axis, to tell most tensors apart cheaply."""
    line = _cut(array, axis, start, start + 1).reshape(-1) if array.ndim == 1 else _cut(array, axis, start, start + 1)
    flat = line.ravel()
    return flat[:8].tobytes() if flat.size <= 8 else flat[np.linspace(0, flat.size - 1, 8).astype(np.intp)].tobytes()


def _walk(
    wanted: Array, axis: int, at: int, by_first: dict[bytes, list[_Layout]], parts: tuple[Expression, ...]
) -> Iterator[tuple[Expression, ...]]:
    length = wanted.shape[axis]
    if at == length:
        if len(parts) > 1:
            yield parts
        return
    if len(parts) >= _MAX_PARTS:
        return
    tried = 0
    for layout in by_first.get(_head(wanted, axis, at), ()):
        stop = at + layout.array.shape[axis]
        if stop <= length and same_bits(_cut(wanted, axis, at, stop), layout.array):
            yield from _walk(wanted, axis, stop, by_first, (*parts, layout.expression))
            tried += 1
            if tried >= _MAX_OPTIONS:
                return


def find_slices(pool: Pool, wanted: Array) -> list[Expression]:
    """The ways in which a weight is a piece of a checkpoint tensor along one axis, bit for bit."""
    found: list[Expression] = []
    if wanted.size == 0:
        return found
    first = as_bits(wanted)[(0,) * wanted.ndim]
    for axis in range(wanted.ndim):
        length = wanted.shape[axis]
        for layout in _fitting(pool, wanted, axis, larger=True):
            whole = layout.array
            line = as_bits(whole)[tuple(slice(None) if i == axis else 0 for i in range(whole.ndim))]
            for start in np.flatnonzero(line[: whole.shape[axis] - length + 1] == first):
                begin = int(start)
                if _head(whole, axis, begin) != _head(wanted, axis, 0):
                    continue
                if same_bits(wanted, _cut(whole, axis, begin, begin + length)):
                    found.append(_slice_first(layout.expression, axis, begin, begin + length))
                    break
            if len(found) >= _MAX_OPTIONS:
                return found
    return found


def _slice_first(expression: Expression, axis: int, start: int, stop: int) -> Expression:
    """Slice before transposing, so that less is moved."""
    if isinstance(expression, Transpose):
        return Transpose(Slice(expression.of, expression.perm[axis], start, stop), expression.perm)
    return Slice(expression, axis, start, stop)
