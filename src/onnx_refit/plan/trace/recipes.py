"""How a tensor is put together from others: strided pieces, and gathers where no strides fit. Data, and its meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

Positions = npt.NDArray[np.int64]
Fetch = Callable[[str], Array]
"""Gives a tensor's elements, flat."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Where the elements of a box lie in a flat tensor: ``offset + sum(index[k] * strides[k])``, in elements."""

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor read along a walk."""

    name: str
    walk: Walk


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the target filled from one operand, or from the product of two.

    Attributes:
        dims: shape of the box.
        target: where it lies in the flat target.
        operands: what it is computed from; a second operand is multiplied onto the first.
    """

    dims: tuple[int, ...]
    target: Walk
    operands: tuple[Operand, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Gather:
    """Single elements of the target taken from single elements of a source.

    Attributes:
        source: the tensor read.
        to: positions in the flat target, int64.
        take: positions in the flat source, int64, as many.
    """

    source: str
    to: Positions
    take: Positions


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tensor as a rearrangement of others; what nothing writes is zero.

    Attributes:
        spec: the tensor's name, dtype and static shape.
        pieces: boxes that overlap nowhere.
        gathers: elements that no box holds.
    """

    spec: TensorSpec
    pieces: tuple[Piece, ...]
    gathers: tuple[Gather, ...] = field(default=())

    @property
    def sources(self) -> frozenset[str]:
        """Names of the tensors it reads."""
        names = {operand.name for piece in self.pieces for operand in piece.operands}
        return frozenset(names | {gather.source for gather in self.gathers})

    @property
    def is_full(self) -> bool:
        """Whether pieces and gathers write every element."""
        written = sum(math.prod(piece.dims) for piece in self.pieces) + sum(g.to.size for g in self.gathers)
        return written == self.spec.size


def whole(spec: TensorSpec, source: str) -> Recipe:
    """The recipe of a tensor that is another one, in the same order."""
    walk = Walk(0, (1,))
    return Recipe(spec, (Piece((spec.size,), walk, (Operand(source, walk),)),))


def is_whole(recipe: Recipe, source_size: int) -> str | None:
    """The tensor of so many elements that the recipe's is: all of them in the same order; None otherwise."""
    return leading(recipe) if source_size == recipe.spec.size else None


def leading(recipe: Recipe) -> str | None:
    """The tensor whose elements, in order from element 0 but perhaps not to its end, the recipe's are; else None."""
    if len(recipe.pieces) != 1 or recipe.gathers:
        return None
    piece = recipe.pieces[0]
    if len(piece.operands) != 1 or math.prod(piece.dims) != recipe.spec.size:
        return None
    walk = piece.operands[0].walk
    steps = c_strides(piece.dims)
    plain = all(
        d == 1 or a == b == s for d, a, b, s in zip(piece.dims, piece.target.strides, walk.strides, steps, strict=True)
    )
    return piece.operands[0].name if plain and walk.offset == piece.target.offset == 0 else None


def c_strides(dims: Sequence[int]) -> tuple[int, ...]:
    """Strides of a C-contiguous tensor, in elements."""
    strides, step = [], 1
    for extent in reversed(dims):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def along(flat: Array, dims: tuple[int, ...], walk: Walk) -> Array:
    """The view of a flat, contiguous tensor along a walk; ValueError where it leaves the tensor."""
    size = flat.dtype.itemsize
    view: Array = np.ndarray(
        dims, flat.dtype, flat.view(np.uint8), walk.offset * size, tuple(s * size for s in walk.strides)
    )
    return view


def fill(recipe: Recipe, fetch: Fetch, out: Array) -> None:
    """Write the recipe's tensor into ``out`` (flat, contiguous, zero wherever the recipe writes nothing)."""
    for piece in recipe.pieces:
        target = along(out, piece.dims, piece.target)
        views = [along(fetch(operand.name), piece.dims, operand.walk) for operand in piece.operands]
        if len(views) == 1:
            np.copyto(target, views[0], casting="unsafe")
        else:
            np.multiply(views[0], views[1], out=target)
    for gather in recipe.gathers:
        out[gather.to] = fetch(gather.source)[gather.take].astype(out.dtype, copy=False)


def evaluate(recipe: Recipe, fetch: Fetch) -> Array:
    """The recipe's tensor, shaped."""
    out = np.zeros(recipe.spec.size, numpy_dtype(recipe.spec.dtype))
    fill(recipe, fetch, out)
    return out.reshape(recipe.spec.static_shape)


def agrees(recipe: Recipe, fetch: Fetch, wanted: Array) -> bool:
    """Whether the recipe gives exactly these bits."""
    flat = np.ascontiguousarray(wanted).reshape(-1)
    if flat.size != recipe.spec.size:
        return False
    if recipe.is_full and not recipe.gathers and all(len(piece.operands) == 1 for piece in recipe.pieces):
        return all(_same(flat, piece, fetch) for piece in recipe.pieces)
    return bits(evaluate(recipe, fetch)).tobytes() == bits(flat).tobytes()


def _same(flat: Array, piece: Piece, fetch: Fetch) -> bool:
    source = fetch(piece.operands[0].name)
    if source.dtype != flat.dtype:
        source_view = along(source, piece.dims, piece.operands[0].walk).astype(flat.dtype)
        return np.array_equal(bits(source_view), along(bits(flat), piece.dims, piece.target))
    views = (along(bits(flat), piece.dims, piece.target), along(bits(source), piece.dims, piece.operands[0].walk))
    return all(np.array_equal(a, b) for a, b in _slabs(views))


def _slabs(views: tuple[Array, Array], elements: int = 1 << 20) -> Iterator[tuple[Array, Array]]:
    """The two views in slices along their first dimension, so that comparing them takes little memory."""
    first, second = views
    if first.ndim == 0 or first.size <= elements:
        yield views
        return
    step = max(1, elements * first.shape[0] // first.size)
    for start in range(0, first.shape[0], step):
        yield first[start : start + step], second[start : start + step]


def bits(array: Array) -> Array:
    """The array's bits as unsigned integers, so that NaN equals itself and -0.0 differs from 0.0."""
    contiguous = np.ascontiguousarray(array)
    return contiguous.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])


def mapped(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The recipe with its sources renamed."""
    pieces = tuple(
        Piece(p.dims, p.target, tuple(Operand(names.get(o.name, o.name), o.walk) for o in p.operands))
        for p in recipe.pieces
    )
    gathers = tuple(Gather(names.get(g.source, g.source), g.to, g.take) for g in recipe.gathers)
    return Recipe(recipe.spec, pieces, gathers)
