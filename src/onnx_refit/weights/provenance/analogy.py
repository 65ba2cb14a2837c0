"""Constant weights (all zeros, all ones) that are pieces: found after the example of the weight beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array
from onnx_refit.weights.provenance.expression import (
    Concat,
    Expression,
    Reshape,
    Slice,
    Stored,
    Transpose,
    evaluate,
    tensors_of,
)
from onnx_refit.weights.provenance.pool import Pool
from onnx_refit.weights.scan import same_bits

_REACH = 3


class Siblings:
    """The tensors of a checkpoint by the module they belong to."""

    def __init__(self, names: Sequence[str]) -> None:
        self._children: dict[str, list[str]] = {}
        for name in names:
            self._children.setdefault(_stem(name), []).append(name)

    def of(self, name: str) -> list[str]:
        """The last parts of the names of the other tensors of the same module."""
        stem = _stem(name)
        return [child[len(stem) :] for child in self._children.get(stem, ()) if child != name]


def _stem(name: str) -> str:
    cut = max(name.rfind("."), name.rfind("/")) + 1
    return name[:cut]


def analogous(
    pool: Pool,
    siblings: Siblings,
    weight: str,
    wanted: Array,
    order: Sequence[str],
    known: Mapping[str, Expression],
) -> Iterator[Expression]:
    """Expressions for a vector made as a neighbour's matrix is made: bias slices like weight slices.

    Args:
        pool: the checkpoint.
        siblings: its tensors by module.
        weight: the weight to explain, one-dimensional.
        wanted: its value.
        order: weights in graph order.
        known: expressions of other weights.
    """
    at = order.index(weight)
    near = [w for w in order[max(0, at - _REACH) : at + _REACH + 1] if w != weight and w in known]
    for other in sorted(near, key=lambda w: abs(order.index(w) - at)):
        example = known[other]
        names = list(dict.fromkeys(tensors_of(example)))
        if not _has_parts(example):
            continue
        for ending in siblings.of(names[0]):
            renamed = {name: _stem(name) + ending for name in names}
            if not all(name in pool.specs for name in renamed.values()):
                continue
            candidate = _like(example, renamed)
            try:
                if candidate is not None and same_bits(wanted, evaluate(candidate, pool.read)):
                    yield candidate
            except WeightsError:
                continue


def _has_parts(expression: Expression) -> bool:
    match expression:
        case Slice() | Concat():
            return True
        case Transpose(of, _) | Reshape(of, _):
            return _has_parts(of)
    return False


def _like(example: Expression, renamed: Mapping[str, str]) -> Expression | None:
    """The example over vectors instead of matrices."""
    match example:
        case Stored(name):
            return Stored(renamed[name])
        case Transpose(of, _) | Reshape(of, _):
            return _like(of, renamed)
        case Slice(of, _, start, stop):
            inner = _like(of, renamed)
            return None if inner is None else Slice(inner, 0, start, stop)
        case Concat(parts, _):
            inners = [_like(part, renamed) for part in parts]
            return None if None in inners else Concat(tuple(i for i in inners if i is not None), 0)
    return None
