"""The map from a checkpoint's names to a model's weights, and how it is found: exactly, bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnx_refit.errors import WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec, is_floating, spec_of
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.provenance.bits import as_bits, is_constant
from onnx_refit.weights.provenance.choose import Tie
from onnx_refit.weights.provenance.clues import Clues
from onnx_refit.weights.provenance.encode import expression_from_json, expression_to_json
from onnx_refit.weights.provenance.expression import Expression, tensors_of
from onnx_refit.weights.provenance.search import search
from onnx_refit.weights.provenance.twins import twins_of
from onnx_refit.weights.recover import RecoveredSource
from onnx_refit.weights.source import WeightSource

_MAX_RANK = 32
_SMALLEST_MASK = 9


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

    def recover(self, weights: WeightSource) -> RecoveredSource:
        """The checkpoint tensors that a model's weights hold whole, by the checkpoint's names."""
        return RecoveredSource(self, weights)

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

    def apply(self, source: WeightSource) -> MappedView:
        """A checkpoint seen as the weights of the model.

        A source that already speaks the model's own names (an ONNX file, arrays by weight name) is recognised by its
        names and passed through; names of the two kinds are never mixed in one source.
        """
        return MappedView(source, self)

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


@dataclass(frozen=True)
class Discovery:
    """What the search for names found.

    Attributes:
        names: the map.
        ties: weights whose bits occur more than once in the checkpoint, with the choice that was made.
        unmatched: weights that are not made of the checkpoint's tensors by any operation that was tried. A checkpoint
            cannot refit them: name them as constants if they are none of its business.
        unused: floating-point checkpoint tensors that no weight is made of.
    """

    names: NameMap
    ties: tuple[Tie, ...] = ()
    unmatched: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


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
    aliases = _aliases(checkpoint, read)
    names = NameMap(
        entries={name: entries[name] for name in weights if name in entries},
        weights={name: spec_of(name, array) for name, array in weights.items()},
        shapes={name: specs[name].static_shape for name in read},
        ignored=frozenset(specs) - read.keys(),
        neutral=_neutral(checkpoint, read),
        fixed=frozenset(n for n, a in weights.items() if n not in entries and n not in specs and _is_structure(a)),
        aliases=aliases,
        twins=twins_of(checkpoint, read),
    )
    unused = tuple(n for n, spec in specs.items() if n not in read and is_floating(spec.dtype))
    # Which name of one storage was chosen makes no difference.
    ties = [tie for tie in ties if not _all_one(tie, aliases)]
    return Discovery(names, tuple(ties), names.unmatched, unused)


def _aliases(checkpoint: WeightSource, read: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The other names of the tensors that share all their memory with one that is read."""
    by_memory: dict[tuple[object, ...], list[str]] = {}
    for name, spec in checkpoint.specs.items():
        if spec.size > 1:
            array = checkpoint.read(name)
            key = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype)
            by_memory.setdefault(key, []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in by_memory.values()
        if len(names) > 1
        for name in names
        if name in read
    }


def _all_one(tie: Tie, aliases: Mapping[str, tuple[str, ...]]) -> bool:
    chosen = list(tensors_of(tie.chosen))
    same = {*chosen, *(other for name in chosen for other in aliases.get(name, ()))}
    return all(same.issuperset(tensors_of(alternative)) for alternative in tie.alternatives)


def _neutral(checkpoint: WeightSource, read: Collection[str]) -> dict[str, float]:
    """The tensors that no weight is made of, that are all zeros or all ones, and that an exporter may have dropped.

    Where the rest of the module is not in the model either, and is not neutral, the module is dead and nothing was
    dropped.
    """
    found: dict[str, float] = {}
    dead: set[str] = set()
    for name, spec in checkpoint.specs.items():
        if name in read or not is_floating(spec.dtype) or spec.size == 0:
            continue
        array = checkpoint.read(name)
        value = float(array.reshape(-1)[0]) if is_constant(array) else None
        if value in (0.0, 1.0):
            found[name] = float(value or 0.0)
        elif spec.size > 1:
            dead.add(_module(name))
    return {name: value for name, value in found.items() if _module(name) not in dead}


def _module(name: str) -> str:
    return name[: max(name.rfind("."), name.rfind("/")) + 1]


def _is_structure(array: Array) -> bool:
    """Whether a tensor has at most two different values: zeros, ones, a mask. Nobody trains such weights."""
    bits = as_bits(np.ascontiguousarray(array)).reshape(-1)
    other = bits[bits != bits[0]] if bits.size else bits
    return other.size == 0 or (bits.size >= _SMALLEST_MASK and bool((other == other[0]).all()))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text expected")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_RANK or not all(type(d) is int and d >= 0 for d in value):
        raise TypeError("shape expected")
    return tuple(value)
