"""Source weights read back from engine weights, where these only rearrange them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from onnx_refit.engine.onnxruntime.specialise import SOURCE, Specialised
from onnx_refit.errors import EngineError
from onnx_refit.plan.trace.recipes import Gather, Operand, Piece, Recipe, Walk, along, fill
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype


class _Box(NamedTuple):
    """A piece of an inverse recipe, ready to be copied: a partial refit reads some weights back, and is short."""

    held: str
    dims: tuple[int, ...]
    to: int  # bytes, like all the others
    to_strides: tuple[int, ...]
    take: int
    take_strides: tuple[int, ...]


class Recoverer:
    """Inverse recipes: source weights over engine weights.

    Args:
        specialised: the recipes.
        sources: every source weight.
    """

    def __init__(self, specialised: Specialised, sources: Mapping[str, TensorSpec]) -> None:
        self._inverses: dict[str, Recipe] = {}
        self._parts: dict[str, Recipe] = {}  # what several engine weights hold of a source, so far
        specs = {SOURCE + name: spec for name, spec in sources.items()}
        specs.update((name, recipe.spec) for name, recipe in specialised.staged.items())
        # Engine weights give sources and staged tensors; staged tensors, last made first, give what they were made of.
        for name, recipe in specialised.buffers.items():
            self._add(name, recipe, specs)
        for name in reversed(list(specialised.staged)):
            if name in self._inverses:
                self._add(name, specialised.staged[name], specs)
        self.names = frozenset(name.removeprefix(SOURCE) for name in self._inverses if name.startswith(SOURCE))
        self._dtypes = {name: numpy_dtype(recipe.spec.dtype) for name, recipe in specialised.buffers.items()}
        self._plain: dict[str, tuple[_Box, ...] | None] = {}

    def _add(self, name: str, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> None:
        for source in recipe.sources:
            spec = specs.get(source)
            if spec is None or source in self._inverses or not _exact(spec.dtype, recipe.spec.dtype):
                continue
            part = _part(name, recipe, source, spec, self._parts.get(source))
            if _covers(part, spec):
                self._inverses[source] = part
            else:
                self._parts[source] = part

    def recover(self, name: str, held: Callable[[str], Array]) -> Array:
        """A source weight (a new array) from engine weights; EngineError where it is not recoverable.

        Args:
            name: the source weight.
            held: gives an engine weight.
        """
        if name not in self.names:
            raise EngineError("the engine's weights do not hold this source weight bit for bit", where=name)
        plain = self._plain.get(name, ())
        if plain == ():
            plain = self._plain[name] = self._boxes(self._inverses[SOURCE + name])
        return self._make(SOURCE + name, held) if plain is None else self._copied(SOURCE + name, plain, held)

    def _boxes(self, recipe: Recipe) -> tuple[_Box, ...] | None:
        """What to copy; None where there is more to do, or for dtypes whose memory Python does not share."""
        dtype, boxes = numpy_dtype(recipe.spec.dtype), []
        for piece in recipe.pieces:
            name, walk = piece.operands[0].name, piece.operands[0].walk
            if name in self._inverses or dtype.isbuiltin != 1 or self._dtypes[name].isbuiltin != 1:
                return None
            to, take = dtype.itemsize, self._dtypes[name].itemsize
            to_strides = tuple(stride * to for stride in piece.target.strides)
            take_strides = tuple(stride * take for stride in walk.strides)
            boxes.append(_Box(name, piece.dims, piece.target.offset * to, to_strides, walk.offset * take, take_strides))
        return None if recipe.gathers or not boxes else tuple(boxes)

    def _copied(self, name: str, boxes: tuple[_Box, ...], held: Callable[[str], Array]) -> Array:
        spec = self._inverses[name].spec
        out: Array = np.empty(spec.static_shape, numpy_dtype(spec.dtype))
        for source, dims, to, to_strides, take, take_strides in boxes:
            found: Array = np.ndarray(dims, self._dtypes[source], held(source), take, take_strides)
            np.ndarray(dims, out.dtype, out, to, to_strides)[...] = found
        return out

    def _make(self, name: str, held: Callable[[str], Array]) -> Array:
        recipe = self._inverses[name]

        def fetch(source: str) -> Array:
            made = self._make(source, held) if source in self._inverses else held(source)
            return made.reshape(-1)

        out = np.empty(recipe.spec.size, numpy_dtype(recipe.spec.dtype))
        fill(recipe, fetch, out)
        return out.reshape(recipe.spec.static_shape)


def _exact(source: str, engine: str) -> bool:
    """Whether values of the source's dtype survive the cast to the engine's dtype and back (NaN payloads aside)."""
    return source == engine or (source, engine) in {("float16", "float32"), ("bfloat16", "float32")}


def _part(name: str, recipe: Recipe, source: str, spec: TensorSpec, before: Recipe | None) -> Recipe:
    """What an engine weight holds of a source, as far as it goes, and what others held before."""
    pieces = [
        Piece(piece.dims, piece.operands[0].walk, (Operand(name, piece.target),))
        for piece in recipe.pieces
        if len(piece.operands) == 1 and piece.operands[0].name == source
    ]
    gathers = [Gather(name, gather.take, gather.to) for gather in recipe.gathers if gather.source == source]
    if before is not None:
        return Recipe(spec, (*before.pieces, *pieces), (*before.gathers, *gathers))
    return Recipe(spec, tuple(pieces), tuple(gathers))


def _covers(part: Recipe, spec: TensorSpec) -> bool:
    """Whether every element of a source is there."""
    held = sum(math.prod(piece.dims) for piece in part.pieces) + sum(gather.to.size for gather in part.gathers)
    if held < spec.size:
        return False
    if len(part.pieces) == 1 and held == spec.size and _distinct(part.pieces[0].dims, part.pieces[0].target):
        return True
    seen = np.zeros(spec.size, bool)
    for piece in part.pieces:
        along(seen, piece.dims, piece.target)[...] = True
    for gather in part.gathers:
        seen[gather.to] = True
    return bool(seen.all())


def _distinct(dims: tuple[int, ...], walk: Walk) -> bool:
    """Whether a walk surely visits no element twice: each stride steps over all that the smaller ones reach."""
    reach = 0
    for stride, extent in sorted((s, e) for s, e in zip(walk.strides, dims, strict=True) if e > 1):
        if stride <= reach:
            return False
        reach += stride * (extent - 1)
    return True
