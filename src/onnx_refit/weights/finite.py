"""Reading many tensors, and which of them hold NaN or infinities: the small ones looked at together.

A call a tensor costs more than reading it where tensors are small; a model may have thousands of such vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from onnx_refit.errors import OnnxRefitError
from onnx_refit.tensors import Array
from onnx_refit.weights.scan import all_finite
from onnx_refit.weights.source import WeightSource

_SMALL = 1 << 13  # elements
_TOGETHER = 1 << 17  # elements joined at once: they stay in the second-level cache
_WINDOW = 1 << 26  # bytes read ahead; more is not held at once on the way to another dtype


class Reader:
    """Reads tensors in a known order, some ahead.

    Args:
        weights: where to read.
        names: the tensors, in the order in which they will be asked for.
        look: whether to look for NaN and infinities.
    """

    def __init__(self, weights: WeightSource, names: Iterable[str], *, look: bool) -> None:
        self._weights = weights
        self._names = iter(names)
        self._look = look
        self._held: dict[str, Array | OnnxRefitError] = {}
        self._infinite: set[str] = set()

    def read(self, name: str) -> tuple[Array, bool]:
        """A tensor, and whether all its elements are finite or nobody looks; raises what reading it raises."""
        if name not in self._held:
            self._ahead()
        found = self._held.pop(name)
        if isinstance(found, OnnxRefitError):
            raise found
        return found, name not in self._infinite

    def _ahead(self) -> None:
        names: list[str] = []
        arrays: list[Array] = []
        left = _WINDOW
        for name in self._names:
            try:
                array = self._weights.read(name)
            except OnnxRefitError as error:
                self._held[name] = error  # to be raised when it is that tensor's turn
                continue
            self._held[name] = array
            names.append(name)
            arrays.append(array)
            left -= array.nbytes
            if left <= 0:
                break
        if self._look:
            self._infinite = {names[position] for position in not_finite(arrays)}


def not_finite(arrays: Sequence[Array]) -> set[int]:
    """The positions of the arrays in which an element is NaN or infinite."""
    found: set[int] = set()
    small: list[int] = []
    held = 0
    single = np.dtype(np.float32)
    for position, array in enumerate(arrays):
        size = array.size
        if array.dtype != single or size > _SMALL:
            if not all_finite(array):
                found.add(position)
            continue
        small.append(position)
        held += size
        if held >= _TOGETHER:
            found |= _together(arrays, small)
            small, held = [], 0
    return found | _together(arrays, small) if small else found


def _together(arrays: Sequence[Array], positions: list[int]) -> set[int]:
    """The same for some of them, float32 all."""
    joined = np.concatenate([arrays[position] for position in positions], axis=None)
    if all_finite(joined):
        return set()
    return {position for position in positions if not all_finite(arrays[position])}
