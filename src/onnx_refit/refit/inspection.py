"""What a refit does with each weight beside deriving: look for NaN and infinities, and keep a copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_refit.engine.protocol import Look
from onnx_refit.tensors import Array
from onnx_refit.weights.finite import not_finite
from onnx_refit.weights.scan import all_finite

_SMALL = 1 << 13  # elements; smaller weights are looked at together, afterwards


class Inspection:
    """Looks at weights once, in parts, in whatever threads: an ``Inspector``.

    Args:
        arrays: the weights, C-contiguous.
        targets: where to copy those that are kept.
        look: whether to look for NaN and infinities.
    """

    def __init__(self, arrays: Mapping[str, Array], targets: Mapping[str, Array], *, look: bool) -> None:
        self._left = dict(arrays) if look else {name: arrays[name] for name in targets}
        self._targets = targets
        self._look = look
        self._suspicious = False

    def claim(self, name: str) -> Look | None:
        """See ``Inspector.claim``."""
        array = self._left.get(name)
        if array is None or array.size < _SMALL:
            return None
        del self._left[name]
        flat, look = array.reshape(-1), self._look
        kept = self._targets.get(name)
        target = None if kept is None else kept.reshape(-1)

        def inspect(begin: int, end: int) -> None:
            part = flat[begin:end]
            if look and not all_finite(part):
                self._suspicious = True
            if target is not None:
                target[begin:end] = part

        return inspect

    def finish(self) -> bool:
        """Look at what nobody claimed; whether all weights are finite, or nobody looks."""
        for name in self._left.keys() & self._targets.keys():
            np.copyto(self._targets[name], self._left[name])
        if self._look and not_finite(list(self._left.values())):
            self._suspicious = True
        self._left = {}
        return not self._suspicious
