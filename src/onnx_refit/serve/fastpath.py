"""Which requests run so quickly that handing them to a thread would cost more than running them.

Waking a thread, and waiting for Python's lock in both directions, takes a few hundred microseconds on a busy machine;
many a small model answers in fifty. Such requests run on the event loop itself, one after the other, as long as an
instance is idle and nobody waits.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnx_refit.tensors import Array

# The event loop may be away this long; a health check or another request waits for it.
_QUICK_SECONDS = 300e-6
_SAMPLES = 8
_WEIGHT = 0.2
_CLAMP_SECONDS = 5e-3
_REMEMBERED = 256

Key = tuple[object, ...]


def bounded_by_shapes(model: onnx.ModelProto) -> bool:
    """Whether a model's running time follows from its inputs' shapes: it has no loops that count to a value."""
    return not any(
        attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
        for node in model.graph.node
        for attribute in node.attribute
    )


class FastPath:
    """Remembers how long inferences of certain shapes took. Used from the event loop's thread only.

    Args:
        model: the graph that the engine runs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._possible = bounded_by_shapes(model)
        self._seen: dict[Key, tuple[int, float]] = {}

    def key(self, inputs: Mapping[str, Array]) -> Key | None:
        """What inferences that take equally long have in common; None where nothing can be said."""
        if not self._possible:
            return None
        # Strings of one shape may be of any length.
        if any(array.dtype.kind == "O" for array in inputs.values()):
            return None
        return tuple((name, array.shape) for name, array in inputs.items())

    def quick(self, key: Key | None) -> bool:
        """Whether inferences of this kind have been quick lately, often enough to rely on it."""
        count, seconds = self._seen.get(key, (0, 0.0)) if key is not None else (0, 0.0)
        return count >= _SAMPLES and seconds < _QUICK_SECONDS

    def note(self, key: Key | None, seconds: float) -> None:
        """Remember how long one took; a mean that forgets, as a slow one may have been a busy moment only."""
        if key is None:
            return
        seconds = min(seconds, _CLAMP_SECONDS)
        count, mean = self._seen.get(key, (0, seconds))
        if count == 0 and len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[key] = (min(count + 1, _SAMPLES), mean + _WEIGHT * (seconds - mean))
