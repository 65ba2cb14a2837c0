"""Memory of weight sets: aligned storage, given back when the last weight set that uses it dies."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from onnx_refit.engine.onnxruntime.native import Value, owned
from onnx_refit.plan.evaluate import pack
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

_ALIGNMENT = 64
_SPARE_SECONDS = 3.0


class Storage:
    """Aligned memory for one engine weight, with what is made once for it.

    Attributes:
        spec: name, dtype and shape.
        array: the array, aligned to 64 bytes.
        flat: the same elements, flat.
        address: of the first of them.
        value: an OrtValue over the array.
        prepared: what its writer made once to write it again and again (the writer fills this).
        steady: the tasks that write it from lasting tensors, and what they are valid for (the deriver fills this).
        settled: whether it is sure that no thread is writing it; never given out again otherwise.
    """

    __slots__ = ("_owner", "address", "array", "flat", "prepared", "settled", "spec", "steady", "value")

    def __init__(self, spec: TensorSpec) -> None:
        dtype = numpy_dtype(spec.dtype)
        nbytes = spec.nbytes
        raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        self.spec = spec
        self.flat: Array = raw[start : start + nbytes].view(dtype)
        self.array: Array = self.flat.reshape(spec.static_shape)
        self.value: Value
        self.value, self._owner = owned(self.array)
        self.address = self.flat.ctypes.data
        self.prepared: Any = None
        self.steady: tuple[object, list[Any]] | None = None
        self.settled = True

    def settle(self) -> None:
        """Note that the array is written and no thread writes it any more; ``value`` has its elements from now on."""
        if self._owner is not self.array:
            pack(self.array, self._owner)
        self.settled = True


class Owner(Protocol):
    """Where memory goes when nobody uses it any more."""

    def give_back(self, storage: Storage) -> None:
        """Take it back: in any thread, so without a lock."""
        ...


class Buffer:
    """One engine weight of living weight sets: never written again once the first of them exists."""

    __slots__ = ("__weakref__", "owner", "storage")

    def __init__(self, storage: Storage, owner: Owner) -> None:
        self.storage = storage
        self.owner = owner

    @property
    def array(self) -> Array:
        """The engine weight."""
        return self.storage.array

    @property
    def spec(self) -> TensorSpec:
        """Its name, dtype and shape."""
        return self.storage.spec

    def __del__(self) -> None:
        # Runs when the last weight set that uses it is gone, in any thread: no lock may be taken here.
        self.owner.give_back(self.storage)


class BufferPool:
    """Gives buffers, and takes back those of dead weight sets so that the next refit touches no fresh memory.

    A fresh page costs about as much as copying it twice, so a refit soon after another one reuses what the dead set
    left: at most one spare storage an engine weight. Spare memory that nobody took for a few seconds is freed.
    Thread-safe without locks: the lists change by atomic operations only.

    Args:
        specs: every engine weight there will be.
        rest: called when spare memory is freed, so that others free theirs.
    """

    def __init__(self, specs: Iterable[TensorSpec], rest: Callable[[], None] | None = None) -> None:
        self._rest = rest
        self._spare: dict[str, list[Storage]] = {spec.name: [] for spec in specs}
        self._keep = True
        self._used = threading.Event()
        self._deadline = 0.0
        self._janitor: threading.Thread | None = None

    def take(self, spec: TensorSpec) -> Buffer:
        """A buffer for this engine weight; its elements are zero or an older value of the same weight."""
        try:
            storage = self._spare[spec.name].pop()
        except IndexError:
            storage = Storage(spec)
        return Buffer(storage, self)

    def give_back(self, storage: Storage) -> None:
        """Take back the storage of a dead buffer."""
        spare = self._spare[storage.spec.name]
        if self._keep and storage.settled and not spare:
            spare.append(storage)

    def touch(self) -> None:
        """Note that buffers were taken: spare ones are kept for a few seconds from now."""
        self._deadline = time.monotonic() + _SPARE_SECONDS
        if self._janitor is None:
            self._janitor = threading.Thread(
                target=_clean, args=(weakref.ref(self), self._used), name="onnx-refit-spare", daemon=True
            )
            self._janitor.start()
        self._used.set()

    def seconds_left(self) -> float:
        """Until spare storage is freed."""
        return self._deadline - time.monotonic()

    def clear(self) -> None:
        """Free every spare storage."""
        for spare in self._spare.values():
            spare.clear()
        if self._rest is not None and self._keep:
            self._rest()

    def close(self) -> None:
        """Free every spare storage, now and from now on."""
        self._keep = False
        self.clear()
        self._deadline = 0.0
        self._used.set()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return not self._keep


def _clean(reference: weakref.ref[BufferPool], used: threading.Event) -> None:
    """Free a pool's spare storage some time after its last use, as long as the pool lives."""
    while True:
        used.wait(timeout=60.0)
        pool = reference()
        if pool is None or pool.closed:
            return
        if used.is_set() and (left := pool.seconds_left()) > 0:
            del pool
            time.sleep(left)
            continue
        used.clear()
        pool.clear()
        del pool
