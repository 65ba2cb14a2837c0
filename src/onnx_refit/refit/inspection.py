"""What a refit does with each weight beside deriving: look for NaN and infinities, and keep a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType

import numpy as np

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
        lasting: see ``Inspector``; these have been looked at and copied.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        targets: Mapping[str, Array],
        *,
        look: bool,
        lasting: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        self._arrays = arrays
        self._targets = targets
        self._look = look
        self._lasting = lasting
        self._suspicious = False

    @property
    def lasting(self) -> Mapping[str, Array]:
        """See ``Inspector``."""
        return self._lasting

    @cached_property
    def _left(self) -> dict[str, Array]:
        """What nobody has claimed."""
        wanted = self._arrays if self._look else self._targets
        return {name: self._arrays[name] for name in wanted if name not in self._lasting}

    def claim_all(self) -> Callable[[], None] | None:
        """See ``Inspector.claim_all``."""
        if not self._look or not self._targets.keys() <= self._lasting.keys():
            return None
        self._left = {}
        return self._suspect

    def claim(self, name: str) -> Inspected | None:
        """See ``Inspector.claim``."""
        array = self._left.get(name)
        if array is None or array.size < _SMALL:
            return None
        del self._left[name]
        kept = self._targets.get(name)
        target = None if kept is None else kept.reshape(-1)
        return Inspected(array.reshape(-1), target, self._suspect if self._look else None)

    def _suspect(self) -> None:
        self._suspicious = True

    def finish(self) -> bool:
        """Look at what nobody claimed; whether all weights are finite, or nobody looks."""
        if self._left:
            for name in self._left.keys() & self._targets.keys():
                np.copyto(self._targets[name], self._left[name])
            if self._look and not_finite(list(self._left.values())):
                self._suspicious = True
            self._left = {}
        return not self._suspicious


class Inspected:
    """One weight being looked at: a ``Look``.

    Attributes:
        keep: see ``Look``.

    Args:
        flat: the weight.
        keep: where to copy it.
        suspect: what to call where an element is not finite; None if nobody asks.
    """

    __slots__ = ("_flat", "_suspect", "keep")

    def __init__(self, flat: Array, keep: Array | None, suspect: Callable[[], None] | None) -> None:
        self._flat = flat
        self._suspect = suspect
        self.keep = keep

    @property
    def watched(self) -> bool:
        """See ``Look``."""
        return self._suspect is not None

    def suspect(self) -> None:
        """See ``Look``."""
        if self._suspect is not None:
            self._suspect()

    def watch(self, begin: int, end: int) -> None:
        """See ``Look``."""
        if self._suspect is not None and not all_finite(self._flat[begin:end]):
            self._suspect()

    def __call__(self, begin: int, end: int) -> None:
        """See ``Look``."""
        self.watch(begin, end)
        if self.keep is not None:
            self.keep[begin:end] = self._flat[begin:end]
