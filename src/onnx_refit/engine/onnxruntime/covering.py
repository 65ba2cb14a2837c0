"""Which sources can be looked at for what is not finite while they are moved: those of which each element is moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from onnx_refit.engine.onnxruntime.moving import Row, Slots, units
from onnx_refit.moves.library import MOVE, ROWS, TILES, WIDE
from onnx_refit.plan.trace.recipes import Recipe, Walk

_KIND, _SOURCE, _FACTOR, _DIMS = ((MOVE.names or ()).index(name) for name in ("kind", "source", "factor", "dims"))
_SIZES = frozenset({2, 4})
_RUN = 32  # elements side by side in the source, of each column of a tile; shorter ones are looked at one by one


def covered(
    recipe: Recipe, dtypes: Mapping[str, np.dtype[np.generic]], sizes: Mapping[str, int], tensors: Mapping[str, str]
) -> Mapping[str, str]:
    """Those of some tensors that native code sees every element of when it writes the recipe.

    Args:
        recipe: an engine weight's.
        dtypes: of the tensors that it reads.
        sizes: elements of these.
        tensors: tensor -> anything, which is given back.
    """
    found = {
        name: value
        for name, value in tensors.items()
        if dtypes[name].kind not in "biuc" and dtypes[name].itemsize in _SIZES and _covers(recipe, name, sizes[name])
    }
    if not found:
        return found
    slots = Slots()
    moves = [row for unit in units(recipe, dtypes, sizes, "target", slots) or () for row in unit.rows]
    looked = {name: [row for row in moves if slots[name] in {row[_SOURCE], row[_FACTOR]}] for name in found}
    return {
        name: found[name]
        for name, rows in looked.items()
        if rows and all(row[_SOURCE] == slots[name] != row[_FACTOR] and _looks(row) for row in rows)
    }


def _looks(row: Row) -> bool:
    """Whether a move looks at what it reads. For others it is faster to look first: that brings it into the cache."""
    if row[_KIND] == TILES:
        return bool(row[_DIMS][-2] >= _RUN)
    return bool(row[_KIND] == ROWS and row[_FACTOR] < 0 and row[_DIMS][-1] >= WIDE)


def _covers(recipe: Recipe, tensor: str, size: int) -> bool:
    """Whether the pieces read each element of a tensor exactly once; False where that takes more to find out."""
    spans = []
    for piece in recipe.pieces:
        for operand in piece.operands:
            if operand.name == tensor:
                if not _injective(piece.dims, operand.walk):
                    return False
                steps = [(d - 1) * s for d, s in zip(piece.dims, operand.walk.strides, strict=True)]
                low = operand.walk.offset + sum(step for step in steps if step < 0)
                high = operand.walk.offset + sum(step for step in steps if step > 0)
                spans.append((low, high, math.prod(piece.dims)))
    if any(gather.source == tensor for gather in recipe.gathers):
        return False
    spans.sort()
    apart = all(a[1] < b[0] for a, b in pairwise(spans))
    return apart and sum(count for *_, count in spans) == size


def _injective(dims: tuple[int, ...], walk: Walk) -> bool:
    """Whether a walk meets no element twice: each stride is longer than all the smaller ones reach."""
    reach = 0
    for stride, extent in sorted((abs(s), d) for d, s in zip(dims, walk.strides, strict=True) if d > 1):
        if stride <= reach:
            return False
        reach += (extent - 1) * stride
    return True
