"""Memory of weight sets: aligned buffers, given back when the last weight set that uses them dies."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np

from onnx_refit.engine.onnxruntime.native import Value, wrap
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

_ALIGNMENT = 64


class Buffer:
    """One engine weight in memory: never written again once its weight set exists.

    Attributes:
        spec: name, dtype and shape.
        array: the array, aligned to 64 bytes.
        value: an OrtValue over that array.
    """

    __slots__ = ("__weakref__", "array", "spec", "value")

    def __init__(self, spec: TensorSpec, storage: Array) -> None:
        self.spec = spec
        dtype, shape = numpy_dtype(spec.dtype), spec.static_shape
        self.array: Array = np.ndarray(shape, dtype, buffer=storage)
        self.value: Value = wrap(self.array)


def _allocate(nbytes: int) -> Array:
    raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes]


class BufferPool:
    """Gives buffers and takes back those of dead weight sets, so that a refit touches no fresh memory.

    A fresh page costs about as much as copying it twice. The pool keeps at most one spare buffer an engine weight
    (together: one spare set). Thread-safe.
    """

    def __init__(self) -> None:
        self._spare: dict[str, Array] = {}
        self._lock = threading.Lock()

    def take(self, spec: TensorSpec) -> Buffer:
        """A buffer for this engine weight; its bytes are zero or those of an older value of the same weight."""
        with self._lock:
            storage = self._spare.pop(spec.name, None)
        if storage is None:
            itemsize = numpy_dtype(spec.dtype).itemsize
            storage = _allocate(math.prod(spec.static_shape) * itemsize)
        buffer = Buffer(spec, storage)
        # The finaliser holds the storage, not the buffer: it runs once nobody holds the buffer any more.
        weakref.finalize(buffer, self._give_back, spec.name, storage).atexit = False
        return buffer

    def _give_back(self, name: str, storage: Array) -> None:
        with self._lock:
            self._spare.setdefault(name, storage)

    def clear(self) -> None:
        """Forget every spare buffer."""
        with self._lock:
            self._spare.clear()
