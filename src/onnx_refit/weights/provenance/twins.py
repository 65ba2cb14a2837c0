"""Tensors of a checkpoint with the same bits under names that say they are one: tied weights saved twice."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

import numpy as np

from onnx_refit.tensors import Array, is_floating
from onnx_refit.weights.provenance.bits import is_constant
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource

_SAMPLES = 64
_NUMBER = re.compile(r"\d+")


def twins_of(checkpoint: WeightSource, read: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The other tensors that have the bits of one that is read.

    Zeros and ones tell nothing, and neither do layers that were made by copying one: their names differ by a number.
    """
    by_kind: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, spec in checkpoint.specs.items():
        if spec.size > 1 and is_floating(spec.dtype):
            by_kind[(spec.dtype, spec.shape)].append(name)
    found: dict[str, tuple[str, ...]] = {}
    for names in by_kind.values():
        alike: dict[bytes, list[str]] = defaultdict(list)
        for name in names if len(names) > 1 else ():
            alike[_sample(checkpoint.read(name))].append(name)
        for group in alike.values():
            for name in group if len(group) > 1 else ():
                if name in read and (others := _equal(checkpoint, name, group)):
                    found[name] = others
    return found


def _equal(checkpoint: WeightSource, name: str, group: list[str]) -> tuple[str, ...]:
    array = checkpoint.read(name)
    if is_constant(array):
        return ()
    return tuple(
        other
        for other in group
        if _NUMBER.sub("", other) != _NUMBER.sub("", name) and same_bits(array, checkpoint.read(other))
    )


def _sample(array: Array) -> bytes:
    """Some elements from all over a tensor."""
    step = max(1, array.size // _SAMPLES)
    return np.ascontiguousarray(array).reshape(-1)[::step][: _SAMPLES + 1].tobytes()
