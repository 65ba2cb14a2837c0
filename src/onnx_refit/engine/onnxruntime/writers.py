"""One engine weight's recipe compiled into copies, products and packings: the tasks of a refit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.crew import Task
from onnx_refit.engine.onnxruntime.packer import Mould, Packer
from onnx_refit.engine.onnxruntime.packing import packing, panels
from onnx_refit.engine.protocol import Look
from onnx_refit.plan.trace.recipes import Gather, Piece, Recipe, Walk, along, leading, mapped
from onnx_refit.tensors import Array, is_extension

WIDE = "wide:"  # the name space of sources cast to float32
SPLIT = 1 << 18  # elements; larger work is cut, so that threads share it and what one looks at is still in its cache
_PACKED = 1 << 12  # elements; smaller blocked matrices are written by NumPy

Tensors = Mapping[str, Array]
"""Flat tensors by their prefixed names."""


@dataclass(frozen=True)
class _Source:
    """Where a piece reads: name, first byte, strides in bytes; whether NumPy exposes such arrays as buffers."""

    name: str
    dtype: np.dtype[np.generic]
    dims: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    exposed: bool


class Writer:
    """Writes one engine weight.

    Attributes:
        size: elements of it.
        widened: the float16 sources that it wants as float32, under ``WIDE`` names.
        reads: the tensors that it reads, the largest share first.

    Args:
        recipe: what it is.
        dtypes: of the tensors that the recipe reads.
        packer: writes blocked tensors; None where the host has none.
        block: the host's block size.
    """

    __slots__ = (
        "_ends",
        "_items",
        "_leading",
        "_pack",
        "_packer",
        "_packs",
        "_pieces",
        "_recipe",
        "reads",
        "size",
        "widened",
    )

    def __init__(
        self, recipe: Recipe, dtypes: Mapping[str, np.dtype[np.generic]], packer: Packer | None, block: int
    ) -> None:
        widened = {n: WIDE + n for n in recipe.sources if _is_widened(dtypes[n], recipe)}
        recipe = mapped(recipe, widened)
        self.widened = frozenset(widened)
        dtypes = {**dtypes, **dict.fromkeys(widened.values(), np.dtype(np.float32))}
        self._recipe = recipe
        self._leading = leading(recipe)
        self._packer = packer
        single = packer is not None and recipe.spec.dtype == "float32"
        single = single and all(dtypes[name] == np.float32 for name in recipe.sources)
        packed = packing(recipe, block) if single and recipe.spec.size >= _PACKED else None
        self._pack = [] if packed is None else list(packed.parts(block, SPLIT))
        self._ends = [*(begin for begin, _ in self._pack[1:]), recipe.spec.size] if self._pack else []
        pieces = [] if self._pack else list(recipe.pieces)
        if single and packed is None:
            # A part of a weight may be blocked too: the panels that recurrences read.
            found = [panels(p, block, SPLIT) if math.prod(p.dims) >= _PACKED else [] for p in pieces]
            pieces = [piece for piece, parts in zip(pieces, found, strict=True) if not parts]
            self._pack = [part for parts in found for part in parts]
            self._ends = [begin + part.rows * part.columns for begin, part in self._pack]
        self._pieces = [part for piece in pieces for part in _cut(piece)]
        # The tensor whose first elements, so many of them, the packings read once each.
        self._packs = ("", 0) if packed is None or packed.offset else (packed.source, packed.rows * packed.columns)
        self._items = [
            tuple(
                _Source(
                    operand.name,
                    dtypes[operand.name],
                    piece.dims,
                    operand.walk.offset * dtypes[operand.name].itemsize,
                    tuple(stride * dtypes[operand.name].itemsize for stride in operand.walk.strides),
                    not is_extension(dtypes[operand.name]),
                )
                for operand in piece.operands
            )
            for piece in self._pieces
        ]
        self.size = recipe.spec.size
        self.reads = recipe.sources

    def tasks(self, tensors: Tensors, storage: Storage, looks: Sequence[tuple[str, Look]] = ()) -> list[Task]:
        """The independent parts of the work. Called for each engine weight at each refit: kept lean.

        Args:
            tensors: what the recipe reads.
            storage: where it goes.
            looks: tensors that it reads, and how to look at them on the way.
        """
        name, size = self._packs
        within = next((look for read, look in looks if read == name and tensors[name].size == size), None)
        moulds, views = self._prepared(storage)
        fetch = tensors.__getitem__
        made: list[Task] = [(size, mould.write, (fetch, within)) for size, mould in moulds]
        if views or self._recipe.gathers:
            made += self._plain(tensors, storage, views)
        for read, look in looks:
            if look is not within:
                made = _looking(made, look, tensors[read].size)
        return made

    def _prepared(self, storage: Storage) -> tuple[tuple[tuple[int, Mould], ...], tuple[Array, ...]]:
        """The moulds over a storage, with their sizes, and the views of it that the other pieces write."""
        prepared: tuple[tuple[tuple[int, Mould], ...], tuple[Array, ...]] | None = storage.prepared
        if prepared is None:
            flat = storage.flat
            moulds = []
            for (begin, part), end in zip(self._pack, self._ends, strict=True):
                assert self._packer is not None
                moulds.append((end - begin, self._packer.mould(part, flat[begin:end])))
            views = tuple(along(flat, piece.dims, piece.target) for piece in self._pieces)
            prepared = storage.prepared = tuple(moulds), views
        return prepared

    def _plain(self, tensors: Tensors, storage: Storage, views: tuple[Array, ...]) -> list[Task]:
        if self._leading is not None and self.size <= SPLIT:
            return [(self.size, np.copyto, (storage.flat, tensors[self._leading][: self.size], "unsafe"))]
        made: list[Task] = []
        for view, sources in zip(views, self._items, strict=True):
            reads = []
            for source in sources:
                flat = tensors[source.name]
                memory = flat if source.exposed else flat.view(np.uint8)
                reads.append(np.ndarray(source.dims, source.dtype, memory, source.offset, source.strides))
            if len(reads) == 1:
                made.append((view.size, np.copyto, (view, reads[0], "unsafe")))
            else:
                made.append((view.size, np.multiply, (reads[0], reads[1], view)))
        gathers = self._recipe.gathers
        return [*made, *((16 * g.to.size, _gather, (g, tensors[g.source], storage.flat)) for g in gathers)]


def _looking(tasks: list[Task], look: Look, size: int) -> list[Task]:
    """The tasks with a look at an equal share of a source of so many elements before each: it then is in the cache."""
    count = len(tasks)
    return [
        (work, _look_and_do, (look, size * k // count, size * (k + 1) // count, call, arguments))
        for k, (work, call, arguments) in enumerate(tasks)
    ]


def alone(look: Look, size: int) -> list[Task]:
    """Tasks that only look at a source of so many elements."""
    return [(min(SPLIT, size - begin), look, (begin, min(size, begin + SPLIT))) for begin in range(0, size, SPLIT)]


def _look_and_do(look: Look, begin: int, end: int, call: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    look(begin, end)
    call(*arguments)


def _is_widened(dtype: np.dtype[np.generic], recipe: Recipe) -> bool:
    """Whether a source is read as float32 by ONNX Runtime's cast: NumPy's takes nine times a copy."""
    return recipe.spec.dtype == "float32" and dtype == np.float16 and recipe.spec.size >= _PACKED


def _gather(gather: Gather, source: Array, target: Array) -> None:
    target[gather.to] = source[gather.take].astype(target.dtype, copy=False)


def _cut(piece: Piece) -> list[Piece]:
    """The piece in parts of about ``SPLIT`` elements, along its first dimension."""
    size = math.prod(piece.dims)
    if size <= SPLIT or piece.dims[0] < 2:
        return [piece]
    step = max(1, piece.dims[0] * SPLIT // size)
    parts = []
    for begin in range(0, piece.dims[0], step):
        dims = (min(step, piece.dims[0] - begin), *piece.dims[1:])

        def moved(walk: Walk, begin: int = begin) -> Walk:
            return Walk(walk.offset + begin * walk.strides[0], walk.strides)

        operands = tuple(type(o)(o.name, moved(o.walk)) for o in piece.operands)
        parts.append(Piece(dims, moved(piece.target), operands))
    return parts
