"""Copies of the source weights that no engine weight gives back, in memory that is used again and again.

Fresh pages cost more than the copy itself, and hundreds of small allocations more than one. So a version whose kept
weights are all new has them in one arena, and a dead version's arena serves the next refit. Once refits pause, what is
kept moves to disk: it is only wanted by later partial refits, diffs and adapters.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_refit.cold import ColdFile, NoDiskError
from onnx_refit.expected import Expected
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype
from onnx_refit.threads import step_back

_ALIGNMENT = 64
_SPARE_SECONDS = 3.0
_MANY = 64  # chunks, some of them perhaps dead


class _Arena:
    """Memory for every kept weight, and the views to write it with: of each, and of those that lie together."""

    __slots__ = ("memory", "together", "views")

    def __init__(self, layout: Mapping[str, _Place], nbytes: int, together: int) -> None:
        self.memory = np.empty(nbytes, np.uint8)
        self.together: Array = self.memory[: 4 * together].view(np.float32)
        self.views = {name: place.view(self.memory) for name, place in layout.items()}


class _Place:
    """Where a weight lies in an arena."""

    __slots__ = ("begin", "dtype", "end", "shape")

    def __init__(self, spec: TensorSpec, begin: int) -> None:
        self.begin = begin
        self.end = begin + spec.nbytes
        self.dtype = numpy_dtype(spec.dtype)
        self.shape = spec.static_shape

    def empty(self) -> Array:
        """Memory for this weight alone."""
        return np.empty(self.shape, self.dtype)

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


class _Leased(Mapping[str, Array]):
    """The weights in a leased arena; views are made when asked for, which is seldom."""

    def __init__(self, lease: _Lease, layout: Mapping[str, _Place]) -> None:
        self._memory: Array = np.asarray(lease)
        self._memory.flags.writeable = False
        self._layout = layout

    def __getitem__(self, name: str) -> Array:
        return self._layout[name].view(self._memory)

    def __contains__(self, name: object) -> bool:
        return name in self._layout

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


class _Chunk:
    """Weights that one refit brought, shared by every version that still has them. Thread-safe.

    Args:
        arrays: the weights, in memory that nobody writes to.
    """

    __slots__ = ("__weakref__", "_arrays")

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def read(self, name: str) -> Array:
        """One weight; WeightsError if it was moved to disk and cannot be read back."""
        return self._arrays[name]

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The weights, where they are now."""
        return self._arrays

    def cool(self, cold: ColdFile) -> None:
        """Move to disk; NoDiskError where that fails, and all is as it was."""
        self._arrays = cold.store(self._arrays)


class _Throughout(Mapping[str, _Chunk]):
    """One refit's weights for every name: made at each refit, looked at at few."""

    __slots__ = ("_chunk", "_names")

    def __init__(self, names: Mapping[str, object], chunk: _Chunk) -> None:
        self._names = names
        self._chunk = chunk

    def __getitem__(self, name: str) -> _Chunk:
        if name not in self._names:
            raise KeyError(name)
        return self._chunk

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Kept(Mapping[str, Array]):
    """What a version keeps: each weight with the refit that brought it.

    Args:
        chunks: weight -> the refit's weights.
    """

    def __init__(self, chunks: Mapping[str, _Chunk]) -> None:
        self.chunks = chunks

    def holder(self, name: str) -> Mapping[str, Array]:
        """The mapping that holds a weight, where it is now."""
        return self.chunks[name].arrays

    def __getitem__(self, name: str) -> Array:
        return self.chunks[name].read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.chunks

    def __iter__(self) -> Iterator[str]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


@dataclass(frozen=True)
class Keeping:
    """Weights about to be kept.

    Attributes:
        targets: weight -> where its copy is to be written.
        finish: gives what is kept, once all are written; afterwards nobody may write.
        together: where those weights' copies lie that lie side by side, flat; None where each lies elsewhere.
    """

    targets: Mapping[str, Array]
    finish: Callable[[], Kept]
    together: Array | None = None


_NONE = Keeping({}, lambda: Kept({}))


class Retainer:
    """Copies the weights that a version has to keep. One refit at a time; what it gives may be read in any thread.

    Args:
        specs: the weights to keep.
        disk: whether to move them to disk once refits pause.
        together: how many of them, the first ones and float32, lie side by side where all are kept at once.
        rest: called in another thread once refits pause, so that others free their memory too.

    Attributes:
        warm_because: why nothing is moved to disk although it should be; None while that works.
    """

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        *,
        disk: bool = True,
        together: int = 0,
        rest: Callable[[], None] | None = None,
    ) -> None:
        self._layout: dict[str, _Place] = {}
        end = joined = 0
        for index, spec in enumerate(specs):
            self._layout[spec.name] = place = _Place(spec, end)
            end = place.end if index < together - 1 else math.ceil(place.end / _ALIGNMENT) * _ALIGNMENT
            joined += spec.size if index < together else 0
        self._together = joined
        self._nbytes = end
        self._rest = rest
        self._spare: list[_Arena] = []
        self._used = threading.Event()
        self._deadline = 0.0
        self._expected = Expected()
        self._janitor: threading.Thread | None = None
        self._disk = disk
        self._cold: ColdFile | None = None
        self._lock = threading.Lock()
        self._warm: list[weakref.ref[_Chunk]] = []
        self.closed = False
        self.warm_because: str | None = None

    def retain(self, arrays: Mapping[str, Array], before: Kept | None) -> Kept:
        """Every weight to keep: a copy where it is given, else as it was before.

        Args:
            arrays: the weights that change, of the declared dtypes and shapes; all of them if nothing was before.
            before: what was kept so far.
        """
        keeping = self.keep(arrays, before)
        for name, target in keeping.targets.items():
            np.copyto(target, arrays[name])
        return keeping.finish()

    def adopt(self, arrays: Mapping[str, Array], before: Kept) -> Kept:
        """What is kept, some of it in somebody else's memory, read when it is asked for.

        Args:
            arrays: the weights to keep among those that change.
            before: what was kept so far.
        """
        if not arrays:
            return before
        chunk = self._chunk(arrays)
        if len(arrays) == len(self._layout):
            return Kept(_Throughout(self._layout, chunk))
        return Kept({**before.chunks, **dict.fromkeys(arrays, chunk)})

    def keep(self, changed: Iterable[str], before: Kept | None) -> Keeping:
        """Memory to write the weights to keep into, for those who write them themselves.

        Args:
            changed: the weights that change; all of them if nothing was before.
            before: what was kept so far.
        """
        names = self._layout.keys() if before is None else self._layout.keys() & changed
        if not names:
            return _NONE if before is None else Keeping({}, lambda: before)
        self._touch()
        if len(names) < len(self._layout):
            arrays = {name: self._layout[name].empty() for name in names}
            return Keeping(arrays, lambda: self._some(arrays, before))
        try:
            arena = self._spare.pop()
        except IndexError:
            arena = _Arena(self._layout, self._nbytes, self._together)
        return Keeping(arena.views, lambda: self._all(arena), arena.together)

    def _some(self, arrays: Mapping[str, Array], before: Kept | None) -> Kept:
        assert before is not None
        for array in arrays.values():
            array.flags.writeable = False
        return Kept({**before.chunks, **dict.fromkeys(arrays, self._chunk(arrays))})

    def _all(self, arena: _Arena) -> Kept:
        return Kept(_Throughout(self._layout, self._chunk(_Leased(_Lease(arena, self._spare), self._layout))))

    def _chunk(self, arrays: Mapping[str, Array]) -> _Chunk:
        chunk = _Chunk(arrays)
        with self._lock:
            if len(self._warm) >= _MANY:
                self._warm = [reference for reference in self._warm if reference() is not None]
            self._warm.append(weakref.ref(chunk))
        self._touch()  # again, and now that it is there: the janitor may have come by since the refit began
        return chunk

    def _touch(self) -> None:
        """Keep a spare arena for a while from now, and what is kept in memory for a few seconds."""
        self._deadline = time.monotonic() + _SPARE_SECONDS
        self._expected.note(_SPARE_SECONDS)
        if self._janitor is None:
            reference = weakref.ref(self)
            self._janitor = threading.Thread(
                target=_clean, args=(reference, self._used), name="onnx-refit-kept", daemon=True
            )
            self._janitor.start()
        if not self._used.is_set():
            self._used.set()

    def seconds_left(self) -> float:
        """Until what is kept moves to disk."""
        return self._deadline - time.monotonic()

    def spare_seconds_left(self) -> float:
        """Until a spare arena is freed: not before that."""
        return self._expected.seconds_left()

    def clear(self) -> None:
        """Free a spare arena, and what others have for a next refit."""
        self._spare.clear()
        if self._rest is not None:
            self._rest()

    def cool(self) -> None:
        """Move what is kept to disk, until the next refit comes; where that fails it stays, and ``warm_because``."""
        while self._disk and not self.closed and self.seconds_left() <= 0:
            with self._lock:
                if not self._warm:
                    return
                reference = self._warm.pop()
            chunk = reference()
            if chunk is None:
                continue
            try:
                if self._cold is None:
                    self._cold = ColdFile()
                chunk.cool(self._cold)
            except NoDiskError as error:
                self.warm_because = str(error)
                with self._lock:
                    self._warm.append(reference)
                return
            self.warm_because = None

    def close(self) -> None:
        """Move nothing to disk any more; what was given can be read on."""
        self.closed = True
        self._used.set()


def _clean(reference: weakref.ref[Retainer], used: threading.Event) -> None:
    """Some time after the last refit: free spare memory, move to disk what is kept; as long as the retainer lives."""
    step_back()
    while True:
        used.wait(timeout=60.0)
        used.clear()  # first: what comes from now on, at any point below, is seen at the next turn
        retainer = reference()
        if retainer is None or retainer.closed:
            return
        if (left := retainer.seconds_left()) > 0:
            used.set()
            del retainer
            time.sleep(left)
            continue
        retainer.cool()
        if (left := retainer.spare_seconds_left()) > 0:
            used.set()
            del retainer
            time.sleep(min(left, _SPARE_SECONDS))
            continue
        retainer.clear()
        del retainer
