"""The map from a checkpoint's names to a model's weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx_refit.errors import WeightsFormatError
from onnx_refit.tensors import TensorSpec
from onnx_refit.weights.provenance.encode import expression_from_json, expression_to_json
from onnx_refit.weights.provenance.expression import Expression, tensors_of

_MAX_RANK = 32


@dataclass(frozen=True)
class NameMap:
    """Which checkpoint tensors each weight of a model is made of, and how.

    Attributes:
        entries: weight -> expression over checkpoint tensors.
        weights: weight -> dtype and shape, for all refittable weights.
        shapes: checkpoint tensor -> its shape, for those that entries read.
        ignored: checkpoint tensors that were seen at build time and are part of no weight.
        neutral: those of them that were all zeros or all ones, and which. An exporter may have left them out for that
            reason, so a checkpoint in which they are anything else is refused.
        fixed: weights that no checkpoint tensor explains and that have one or two values throughout, such as initial
            states of zeros and masks: they belong to the model, not to the checkpoint, and stay.
        aliases: checkpoint tensor -> other names that its storage had (tied weights). Formats that store such a tensor
            once keep one of the names.
        twins: checkpoint tensor -> other tensors that had its bits, in memory of their own. A checkpoint that has one
            of them only is taken as one that stores tied weights once.
    """

    entries: Mapping[str, Expression]
    weights: Mapping[str, TensorSpec]
    shapes: Mapping[str, tuple[int, ...]]
    ignored: frozenset[str] = frozenset()
    neutral: Mapping[str, float] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The weights that no expression gives; a checkpoint in its own names cannot refit them."""
        return tuple(name for name in self.weights if name not in self.entries and name not in self.fixed)

    def restrict(self, weights: Collection[str]) -> NameMap:
        """The map for some of the weights; the tensors that only the others are made of become ignored ones."""
        entries = {name: entry for name, entry in self.entries.items() if name in weights}
        read = {tensor for entry in entries.values() for tensor in tensors_of(entry)}
        return NameMap(
            entries,
            {name: spec for name, spec in self.weights.items() if name in weights},
            {name: shape for name, shape in self.shapes.items() if name in read},
            self.ignored | (self.shapes.keys() - read),
            self.neutral,
            self.fixed & frozenset(weights),
            {name: others for name, others in self.aliases.items() if name in read},
            {name: others for name, others in self.twins.items() if name in read},
        )

    def to_json(self) -> dict[str, Any]:
        """The map as JSON-able values."""
        return {
            "entries": {name: expression_to_json(expression) for name, expression in self.entries.items()},
            "weights": {name: [spec.dtype, list(spec.static_shape)] for name, spec in self.weights.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "ignored": sorted(self.ignored),
            "neutral": dict(self.neutral),
            "fixed": sorted(self.fixed),
            "aliases": {name: list(others) for name, others in self.aliases.items()},
            "twins": {name: list(others) for name, others in self.twins.items()},
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
            neutral = {_text(name): {0: 0.0, 1: 1.0}[one] for name, one in value["neutral"].items()}
            fixed = frozenset(_text(name) for name in value["fixed"])
            aliases = {_text(name): tuple(map(_text, others)) for name, others in value["aliases"].items()}
            twins = {_text(name): tuple(map(_text, others)) for name, others in value.get("twins", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightsFormatError(f"no map of names: {error!r}") from error
        read = {name for expression in entries.values() for name in tensors_of(expression)}
        if not read <= shapes.keys() or not entries.keys() | fixed <= weights.keys() or entries.keys() & fixed:
            raise WeightsFormatError("the map of names contradicts itself")
        return cls(entries, weights, shapes, ignored, neutral, fixed, aliases, twins)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text expected")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_RANK or not all(type(d) is int and d >= 0 for d in value):
        raise TypeError("shape expected")
    return tuple(value)
