"""Walks through walks: where a walk over a tensor leads, if that tensor's order is itself a walk over another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx_refit.plan.trace.recipes import Walk, c_strides


@dataclass(frozen=True)
class Order:
    """The flat order of a tensor X in terms of a tensor Y: X counts through ``dims`` in C order, Y moves by ``walk``.

    Attributes:
        dims: extents, the product being X's size.
        walk: position in Y of X's index.
    """

    dims: tuple[int, ...]
    walk: Walk


@dataclass(frozen=True)
class Split:
    """How each dimension of a box was cut so that a composition stays a walk.

    Attributes:
        extents: for each dimension of the box, the extents it was cut into, outer first.
        walk: the composed walk over all the cut dimensions in order.
    """

    extents: tuple[tuple[int, ...], ...]
    walk: Walk

    @property
    def dims(self) -> tuple[int, ...]:
        """The cut box's shape."""
        return tuple(extent for group in self.extents for extent in group)

    def carry(self, walk: Walk) -> Walk:
        """Another walk over the same box, over the cut dimensions."""
        strides: list[int] = []
        for group, stride in zip(self.extents, walk.strides, strict=True):
            strides += [stride * step for step in c_strides(group)]
        return Walk(walk.offset, tuple(strides))


def through(dims: tuple[int, ...], walk: Walk, order: Order) -> Split | None:
    """A walk over X as a walk over Y; None where a step would carry from one dimension of the order into the next."""
    if not order.dims:  # a scalar has no axis to be walked along
        order = Order((1,), Walk(order.walk.offset, (0,)))
    radix = c_strides(order.dims)
    size = math.prod(order.dims)
    if not 0 <= walk.offset < max(1, size):
        return None
    digits = [walk.offset // r % max(1, e) for r, e in zip(radix, order.dims, strict=True)]
    reach = list(digits)
    extents: list[tuple[int, ...]] = []
    strides: list[int] = []
    for extent, stride in zip(dims, walk.strides, strict=True):
        cut = _cut(extent, stride, order, radix)
        if cut is None:
            return None
        extents.append(tuple(part for part, _, _ in cut))
        for part, axis, step in cut:
            strides.append(step * order.walk.strides[axis])
            reach[axis] += (part - 1) * step
    if any(r >= e for r, e in zip(reach, order.dims, strict=True)):
        return None
    offset = order.walk.offset + sum(d * s for d, s in zip(digits, order.walk.strides, strict=True))
    return Split(tuple(extents), Walk(offset, tuple(strides)))


def _cut(extent: int, stride: int, order: Order, radix: tuple[int, ...]) -> list[tuple[int, int, int]] | None:
    """(extent, axis of the order, step along it) parts of one dimension, outer first."""
    if extent == 1 or stride == 0:
        return [(extent, len(order.dims) - 1, 0)]
    if stride < 0:
        return None
    parts: list[tuple[int, int, int]] = []
    while extent > 1:
        ranges = enumerate(zip(radix, order.dims, strict=True))
        axis = next((k for k, (r, e) in ranges if r <= stride < r * e), -1)
        if axis < 0 or stride % radix[axis]:
            return None
        step = stride // radix[axis]
        room = order.dims[axis]
        if (extent - 1) * step < room:
            parts.append((extent, axis, step))
            break
        inner = room // step
        if room % step or extent % inner:
            return None
        parts.append((inner, axis, step))
        extent //= inner
        stride *= inner
    return parts[::-1]
