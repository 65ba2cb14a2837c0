"""How the map from a checkpoint's names to a model's weights is found: exactly, bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_refit.tensors import Array, is_floating, spec_of
from onnx_refit.weights.name_map import NameMap
from onnx_refit.weights.provenance.bits import as_bits, is_constant
from onnx_refit.weights.provenance.choose import Tie
from onnx_refit.weights.provenance.clues import Clues
from onnx_refit.weights.provenance.expression import tensors_of
from onnx_refit.weights.provenance.search import search
from onnx_refit.weights.provenance.twins import twins_of
from onnx_refit.weights.source import WeightSource

_SMALLEST_MASK = 9


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
