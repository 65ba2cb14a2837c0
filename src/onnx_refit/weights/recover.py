"""A map of names read backwards: checkpoint tensors out of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.name_map import NameMap
from onnx_refit.weights.provenance.expression import (
    Concat,
    Convert,
    Expression,
    Reshape,
    Scale,
    Slice,
    Stored,
    Take,
    Transpose,
)
from onnx_refit.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a part of a checkpoint tensor lies in a weight.

    Attributes:
        weight: the weight.
        path: from the weight inwards, the operations between it and the tensor; of a concatenation the part's number.
        axis: the axis of the tensor that is cut, None for the whole of it.
        start: where the part begins on it.
        stop: where it ends.
    """

    weight: str
    path: tuple[tuple[Expression, int], ...]
    axis: int | None
    start: int
    stop: int


class RecoveredSource:
    """The checkpoint tensors that a model's weights hold whole, by the checkpoint's names.

    A tensor can be recovered if weights are rearrangements of it, or of pieces that together make it up. What was
    scaled, folded or rounded cannot.

    Args:
        names: the map of the model.
        weights: the weights, by the model's names.
    """

    def __init__(self, names: NameMap, weights: WeightSource) -> None:
        self._shapes, self._weights = names.shapes, weights
        pieces: dict[str, list[_Piece]] = {}
        for weight, expression in names.entries.items():
            if weight in weights.specs:
                _collect(weight, expression, (), names.shapes, pieces)
        self._chosen = {
            name: chosen for name, found in pieces.items() if (chosen := _cover(found, names.shapes[name])) is not None
        }
        self._specs = MappingProxyType(
            {
                name: TensorSpec(name, weights.specs[chosen[0].weight].dtype, names.shapes[name])
                for name, chosen in self._chosen.items()
            }
        )

    @property
    def description(self) -> str:
        """Where the weights come from."""
        return self._weights.description

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Checkpoint name -> spec of what can be recovered."""
        return self._specs

    def read(self, name: str) -> Array:
        """One checkpoint tensor, bit for bit; WeightsError where the weights do not hold it whole."""
        pieces = self._chosen.get(name)
        if pieces is None:
            raise WeightsError(f"the weights do not hold {name!r} whole", where=self.description)
        parts = [self._extract(piece) for piece in pieces]
        axis = pieces[0].axis
        return parts[0] if axis is None else np.concatenate(parts, axis)

    def close(self) -> None:
        """Close the weights."""
        self._weights.close()

    def _extract(self, piece: _Piece) -> Array:
        array = self._weights.read(piece.weight)
        for operation, part in piece.path:
            match operation:
                case Transpose(_, perm):
                    array = array.transpose(np.argsort(perm))
                case Reshape(of, _):
                    array = np.ascontiguousarray(array).reshape(_shape(of, self._shapes))
                case Concat(parts, axis):
                    start = sum(_shape(p, self._shapes)[axis] for p in parts[:part])
                    stop = start + _shape(parts[part], self._shapes)[axis]
                    array = array[(slice(None),) * axis + (slice(start, stop),)]
        return array


def _collect(
    weight: str,
    expression: Expression,
    path: tuple[tuple[Expression, int], ...],
    shapes: Mapping[str, tuple[int, ...]],
    found: dict[str, list[_Piece]],
) -> None:
    match expression:
        case Stored(name):
            found.setdefault(name, []).append(_Piece(weight, path, None, 0, 0))
        case Slice(Stored(name), axis, start, stop):
            found.setdefault(name, []).append(_Piece(weight, path, axis, start, min(stop, shapes[name][axis])))
        case Transpose(of, _) | Reshape(of, _):
            _collect(weight, of, (*path, (expression, 0)), shapes, found)
        case Concat(parts, _):
            for number, part in enumerate(parts):
                _collect(weight, part, (*path, (expression, number)), shapes, found)


def _cover(pieces: list[_Piece], shape: tuple[int, ...]) -> list[_Piece] | None:
    """Pieces that make up the whole tensor, in order along one axis; None where there is a gap."""
    whole = next((piece for piece in pieces if piece.axis is None), None)
    if whole is not None:
        return [whole]
    for axis in range(len(shape)):
        at, chosen = 0, []
        for piece in sorted((p for p in pieces if p.axis == axis), key=lambda p: (p.start, p.stop)):
            if piece.start == at and piece.stop > at:
                chosen.append(piece)
                at = piece.stop
        if chosen and at == shape[axis]:
            return chosen
    return None


def _shape(expression: Expression, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape an expression of rearrangements gives."""
    match expression:
        case Stored(name):
            return shapes[name]
        case Reshape(_, shape):
            return shape
        case Transpose(of, perm):
            inner = _shape(of, shapes)
            return tuple(inner[axis] for axis in perm)
        case Slice(of, axis, start, stop):
            inner = _shape(of, shapes)
            return (*inner[:axis], min(stop, inner[axis]) - start, *inner[axis + 1 :])
        case Take(of, axis, indices):
            inner = _shape(of, shapes)
            return (*inner[:axis], len(indices), *inner[axis + 1 :])
        case Concat(parts, axis):
            inner = _shape(parts[0], shapes)
            return (*inner[:axis], sum(_shape(p, shapes)[axis] for p in parts), *inner[axis + 1 :])
        case Convert(of, _) | Scale(of, _, _):
            return _shape(of, shapes)
    # A fold: the shape of the layer's weight, or of the channels for its bias.
    return shapes[expression.variance] if expression.of is None else _shape(expression.of, shapes)
