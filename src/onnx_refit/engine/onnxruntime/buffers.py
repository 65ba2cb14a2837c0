"""Memory of weight sets: aligned storage, given back when the last weight set that uses it dies."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from onnx_refit.engine.onnxruntime.native import Value, owned
from onnx_refit.expected import Expected
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

    @property
    def packs(self) -> bool:
        """Whether ``value`` is in other memory than the array, which ``settle`` fills."""
        return self._owner is not self.array

    def settle(self) -> None:
        """Note that the array is written and no thread writes it any more; ``value`` has its elements from now on."""
        if self.packs:
            pack(self.array, self._owner)
        self.settled = True


class Owner(Protocol):
    """Where memory goes when nobody uses it any more."""

    def give_back(self, storage: Storage) -> None:
        """Take it back: in any thread, so without a lock."""
        ...


class Buffer:
    """One engine weight of living weight sets: never written again once the first of them exists.

    Its owner takes the memory back; one of a rack or a session has none, for these go back whole.
    """

    __slots__ = ("__weakref__", "owner", "storage")

    def __init__(self, storage: Storage, owner: Owner | None) -> None:
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
        if self.owner is not None:
            self.owner.give_back(self.storage)


class Rack:
    """Storage for every engine weight at once: a refit of all of them asks nothing of each.

    Attributes:
        storages: engine weight -> its storage.
        buffers: engine weight -> its buffer; without owners.
        prepared: what was made once to write all of it again and again (the deriver fills this).
        runner: what runs a session with it (the backend fills this).
        settled: whether it is sure that no thread is writing to it; never given out again otherwise.
    """

    __slots__ = ("_loose", "buffers", "prepared", "runner", "settled", "storages")

    def __init__(self, storages: Mapping[str, Storage]) -> None:
        self.storages = storages
        self.buffers: Mapping[str, Buffer] = {name: Buffer(storage, None) for name, storage in storages.items()}
        self._loose = [storage for storage in storages.values() if storage.packs]
        self.prepared: Any = None
        self.runner: Any = None
        self.settled = True

    def settle(self) -> None:
        """Note that everything is written and no thread writes any more."""
        for storage in self._loose:
            storage.settle()
        self.settled = True


class RackLease:
    """A rack while a weight set has it; the pool gets it back when the set is gone.

    Attributes:
        rack: the rack.
    """

    __slots__ = ("_pool", "_whole", "rack")

    def __init__(self, rack: Rack, pool: BufferPool) -> None:
        self.rack = rack
        self._pool = pool
        self._whole = True

    def share(self) -> None:
        """Let each of its buffers live as long as a weight set uses it: another one is about to share some of them.

        Whoever calls this holds a weight set that has the lease.
        """
        if self._whole:
            self._whole = False  # first: an interrupt may leave buffers without an owner, but never with two
            for buffer in self.rack.buffers.values():
                buffer.owner = self._pool

    def __del__(self) -> None:
        # In any thread: no lock may be taken here.
        if self._whole:
            self._pool.give_back_rack(self.rack)


class BufferPool:
    """Gives buffers, and takes back those of dead weight sets so that the next refit touches no fresh memory.

    A fresh page costs about as much as copying it twice, so a refit soon after another one reuses what the dead set
    left: at most one spare storage an engine weight, alone or in a rack. Spare memory is freed when no refit is
    expected any more. Thread-safe without locks: the lists change by atomic operations only.

    Args:
        specs: every engine weight there will be.
        rest: called when spare memory is freed, so that others free theirs.
    """

    def __init__(self, specs: Iterable[TensorSpec], rest: Callable[[], None] | None = None) -> None:
        self._rest = rest
        self._specs = tuple(specs)
        self._spare: dict[str, list[Storage]] = {spec.name: [] for spec in self._specs}
        self._racks: list[Rack] = []
        self._scattered = False  # whether there may be spare storage outside racks
        self._keep = True
        self._used = threading.Event()
        self._expected = Expected()
        self._janitor: threading.Thread | None = None

    def take(self, spec: TensorSpec) -> Buffer:
        """A buffer for this engine weight; its elements are zero or an older value of the same weight."""
        return Buffer(self._taken(spec), self)

    def _taken(self, spec: TensorSpec) -> Storage:
        spare = self._spare[spec.name]
        try:
            if not spare and self._racks:
                self._scattered = True
                for name, storage in self._racks.pop().storages.items():
                    self._spare[name].append(storage)
            return spare.pop()
        except IndexError:
            return Storage(spec)

    def take_all(self) -> RackLease:
        """A rack of buffers for all engine weights, whose elements are as those of ``take``."""
        try:
            rack = self._racks.pop()
        except IndexError:
            rack = Rack({spec.name: self._taken(spec) for spec in self._specs})
        return RackLease(rack, self)

    def give_back(self, storage: Storage) -> None:
        """Take back the storage of a dead buffer."""
        spare = self._spare[storage.spec.name]
        if self._keep and storage.settled and not spare and not self._racks:
            self._scattered = True
            spare.append(storage)

    def give_back_rack(self, rack: Rack) -> None:
        """Take back a rack that no weight set has any more."""
        if self._keep and rack.settled and not self._racks:
            self._racks.append(rack)
            if self._scattered:
                self._scattered = False
                for spare in self._spare.values():
                    spare.clear()

    def touch(self) -> None:
        """Note that buffers were taken: spare ones are kept for a while from now."""
        self._expected.note(_SPARE_SECONDS)
        if self._janitor is None:
            self._janitor = threading.Thread(
                target=_clean, args=(weakref.ref(self), self._used), name="onnx-refit-spare", daemon=True
            )
            self._janitor.start()
        if not self._used.is_set():
            self._used.set()

    def seconds_left(self) -> float:
        """Until spare storage is freed."""
        return self._expected.seconds_left()

    def clear(self) -> None:
        """Free every spare storage."""
        self._racks.clear()
        for spare in self._spare.values():
            spare.clear()
        if self._rest is not None and self._keep:
            self._rest()

    def close(self) -> None:
        """Free every spare storage, now and from now on."""
        self._keep = False
        self.clear()
        self._expected.until = 0.0
        self._used.set()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return not self._keep


def _clean(reference: weakref.ref[BufferPool], used: threading.Event) -> None:
    """Free a pool's spare storage some time after its last use, as long as the pool lives."""
    while True:
        used.wait(timeout=60.0)
        used.clear()  # first: what comes from now on, at any point below, is seen at the next turn
        pool = reference()
        if pool is None or pool.closed:
            return
        if (left := pool.seconds_left()) > 0:
            used.set()
            del pool
            time.sleep(min(left, _SPARE_SECONDS))  # an engine that is closed meanwhile ends this soon
            continue
        pool.clear()
        del pool
