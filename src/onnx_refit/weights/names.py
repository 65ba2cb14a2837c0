"""The map from a checkpoint's names to a model's weights, and how it is found: exactly, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from onnx_refit.errors import WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec, spec_of
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.provenance.choose import Tie
from onnx_refit.weights.provenance.clues import Clues
from onnx_refit.weights.provenance.encode import expression_from_json, expression_to_json
from onnx_refit.weights.provenance.expression import Expression, tensors_of
from onnx_refit.weights.provenance.search import search
from onnx_refit.weights.source import WeightSource

_MAX_RANK = 32


@dataclass(frozen=True)
class NameMap:
    """Which checkpoint tensors each weight of a model is made of, and how.

    Attributes:
        entries: weight -> expression over checkpoint tensors.
        weights: weight -> dtype and shape, for all refittable weights.
        shapes: checkpoint tensor -> its shape, for those that entries read.
        ignored: checkpoint tensors that were seen at build time and are part of no weight.
    """

    entries: Mapping[str, Expression]
    weights: Mapping[str, TensorSpec]
    shapes: Mapping[str, tuple[int, ...]]
    ignored: frozenset[str] = frozenset()

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The weights that no expression gives; a checkpoint in its own names cannot refit them."""
        return tuple(name for name in self.weights if name not in self.entries)

    def apply(self, source: WeightSource) -> MappedView:
        """A checkpoint seen as the weights of the model.

        A source that already speaks the model's own names (an ONNX file, arrays by weight name) is recognised by its
        names and passed through; names of the two kinds are never mixed in one source.
        """
        return MappedView(source, self.entries, self.weights, self.shapes, self.ignored)

    def to_json(self) -> dict[str, Any]:
        """The map as JSON-able values."""
        return {
            "entries": {name: expression_to_json(expression) for name, expression in self.entries.items()},
            "weights": {name: [spec.dtype, list(spec.static_shape)] for name, spec in self.weights.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "ignored": sorted(self.ignored),
        }

    @classmethod
    def from_json(cls, value: Any) -> NameMap:
        """The map that ``to_json`` gave; WeightsFormatError for anything else."""
        try:
            entries = {_text(name): expression_from_json(e) for name, e in value["entries"].items()}
            weights = {
                _text(name): TensorSpec(name, _text(dtype), _shape(shape))
                for name, (dtype, shape) in value["weights"].items()
            }
            shapes = {_text(name): _shape(shape) for name, shape in value["shapes"].items()}
            ignored = frozenset(_text(name) for name in value["ignored"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightsFormatError(f"no map of names: {error!r}") from error
        read = {name for expression in entries.values() for name in tensors_of(expression)}
        if not read <= shapes.keys() or not entries.keys() <= weights.keys():
            raise WeightsFormatError("the map of names contradicts itself")
        return cls(entries, weights, shapes, ignored)


@dataclass(frozen=True)
class Discovery:
    """What the search for names found.

    Attributes:
        names: the map.
        ties: weights whose bits occur more than once in the checkpoint, with the choice that was made.
        unmatched: weights that are not made of the checkpoint's tensors by any operation that was tried.
    """

    names: NameMap
    ties: tuple[Tie, ...] = ()
    unmatched: tuple[str, ...] = field(default=())


def find_names(
    weights: Mapping[str, Array], checkpoint: WeightSource, clues: Clues | onnx.ModelProto | None = None
) -> Discovery:
    """Find out which checkpoint tensor each weight of a model is.

    A weight is matched only if its bits come out of the checkpoint's tensors exactly: as they are, transposed,
    reshaped, cast, sliced, concatenated, scaled, or with a BatchNorm folded in. Where several tensors have the same
    bits (all-zero biases), names and places in the graph decide, and the tie is reported.

    Args:
        weights: weight name -> its value in the model.
        checkpoint: the checkpoint that the model was exported from.
        clues: the model, or what is known of the weights' uses; without it ties are broken by names and order alone.

    Raises:
        WeightsError: the checkpoint cannot be read.
    """
    if isinstance(clues, onnx.ModelProto):
        clues = Clues.of_model(clues)
    entries, ties = search(weights, checkpoint, clues or Clues(tuple(weights)))
    specs = checkpoint.specs
    read = dict.fromkeys(name for expression in entries.values() for name in tensors_of(expression))
    names = NameMap(
        entries={name: entries[name] for name in weights if name in entries},
        weights={name: spec_of(name, array) for name, array in weights.items()},
        shapes={name: specs[name].static_shape for name in read},
        ignored=frozenset(specs) - read.keys(),
    )
    return Discovery(names, tuple(ties), names.unmatched)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text expected")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_RANK or not all(type(d) is int and d >= 0 for d in value):
        raise TypeError("shape expected")
    return tuple(value)
