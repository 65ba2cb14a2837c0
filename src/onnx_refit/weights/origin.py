"""Through views of a checkpoint to the tensors it is made of, where these are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.provenance.expression import Expression, Stored, renamed
from onnx_refit.weights.rules import RenamedView
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource


@dataclass(frozen=True)
class Origin:
    """Where the tensors of a source come from.

    Attributes:
        tensors: name -> value as it was given, on its own device.
        parts: tensor of the source -> how it is made of those.
        steady: whether what the source says of itself depends on no values.
    """

    tensors: Mapping[str, object]
    parts: Mapping[str, Expression]
    steady: bool


def origin_of(source: WeightSource) -> Origin | None:
    """Where the tensors of a source come from; None where they are not in memory, or the way is not known."""
    if type(source) is ArraysSource:
        return Origin(source.values, {name: Stored(name) for name in source.values}, steady=True)
    if not isinstance(source, MappedView | RenamedView):
        return None
    inner, parts = source.origin
    found = origin_of(inner)
    if found is None or isinstance(inner, MappedView):
        return None
    # What a view of renamed tensors reads is a tensor of another name and nothing else.
    own = {name: part.name for name, part in found.parts.items() if isinstance(part, Stored)}
    steady = found.steady and (not isinstance(source, MappedView) or source.steady)
    return Origin(found.tensors, {name: renamed(part, own.__getitem__) for name, part in parts.items()}, steady)
