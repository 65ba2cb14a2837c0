"""Copies of the source weights that no engine weight gives back, in memory that is used again and again.

Fresh pages cost more than the copy itself, and hundreds of small allocations more than one. So a version whose kept
weights are all new has them in one arena, and a dead version's arena serves the next refit.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

_ALIGNMENT = 64
_SPARE_SECONDS = 3.0


def own_copy(array: Array) -> Array:
    """A copy that nobody can change: callers write to their arrays, and replace or cut the files they map."""
    copied = np.array(array)
    copied.flags.writeable = False
    return copied


class _Arena:
    """Memory for every kept weight, and the views to write it with."""

    __slots__ = ("memory", "views")

    def __init__(self, layout: Mapping[str, _Place], nbytes: int) -> None:
        self.memory = np.empty(nbytes, np.uint8)
        self.views = {name: place.view(self.memory) for name, place in layout.items()}


class _Place:
    """Where a weight lies in an arena."""

    __slots__ = ("begin", "dtype", "end", "shape")

    def __init__(self, spec: TensorSpec, begin: int) -> None:
        self.begin = begin
        self.end = begin + spec.nbytes
        self.dtype = numpy_dtype(spec.dtype)
        self.shape = spec.static_shape

    def view(self, memory: Array) -> Array:
        """The weight in this memory."""
        return memory[self.begin : self.end].view(self.dtype).reshape(self.shape)


class _Lease:
    """Gives an arena back when the version and every array read from it are gone.

    NumPy keeps the object behind ``__array_interface__`` alive as the base of its views.
    """

    __slots__ = ("__array_interface__", "_arena", "_spare")

    def __init__(self, arena: _Arena, spare: list[_Arena]) -> None:
        self._arena = arena
        self._spare = spare
        self.__array_interface__: dict[str, Any] = arena.memory.__array_interface__

    def __del__(self) -> None:
        # In any thread: no lock may be taken here.
        if not self._spare:
            self._spare.append(self._arena)


class _Kept(Mapping[str, Array]):
    """The weights in a leased arena; views are made when asked for, which is seldom."""

    def __init__(self, lease: _Lease, layout: Mapping[str, _Place]) -> None:
        self._lease = lease
        self._layout = layout

    def __getitem__(self, name: str) -> Array:
        array = self._layout[name].view(np.asarray(self._lease))
        array.flags.writeable = False
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._layout

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


class Retainer:
    """Copies the weights that a version has to keep. One refit at a time; what it gives may be read in any thread.

    Args:
        specs: the weights to keep.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._layout: dict[str, _Place] = {}
        end = 0
        for spec in specs:
            self._layout[spec.name] = place = _Place(spec, end)
            end = math.ceil(place.end / _ALIGNMENT) * _ALIGNMENT
        self._nbytes = end
        self._spare: list[_Arena] = []
        self._used = threading.Event()
        self._deadline = 0.0
        self._janitor: threading.Thread | None = None

    def retain(self, arrays: Mapping[str, Array], before: Mapping[str, Array]) -> Mapping[str, Array]:
        """Every weight to keep: a copy where it is given, else as it was before.

        Args:
            arrays: the weights that change, of the declared dtypes and shapes.
            before: what was kept so far.
        """
        if not self._layout:
            return {}
        if not self._layout.keys() <= arrays.keys():
            return {name: own_copy(arrays[name]) if name in arrays else before[name] for name in self._layout}
        self._touch()
        try:
            arena = self._spare.pop()
        except IndexError:
            arena = _Arena(self._layout, self._nbytes)
        for name, view in arena.views.items():
            np.copyto(view, arrays[name])
        return _Kept(_Lease(arena, self._spare), self._layout)

    def _touch(self) -> None:
        """Keep a spare arena for a few seconds from now."""
        self._deadline = time.monotonic() + _SPARE_SECONDS
        if self._janitor is None:
            reference = weakref.ref(self)
            self._janitor = threading.Thread(
                target=_clean, args=(reference, self._used), name="onnx-refit-kept", daemon=True
            )
            self._janitor.start()
        self._used.set()

    def seconds_left(self) -> float:
        """Until a spare arena is freed."""
        return self._deadline - time.monotonic()

    def clear(self) -> None:
        """Free a spare arena."""
        self._spare.clear()


def _clean(reference: weakref.ref[Retainer], used: threading.Event) -> None:
    """Free spare memory some time after the last refit, as long as the retainer lives."""
    while True:
        used.wait(timeout=60.0)
        retainer = reference()
        if retainer is None:
            return
        if used.is_set() and (left := retainer.seconds_left()) > 0:
            del retainer
            time.sleep(left)
            continue
        used.clear()
        retainer.clear()
        del retainer
