"""GPU memory and streams through the CUDA driver library itself, so that TensorRT needs no other package beside it.

``libcuda.so.1`` is on every machine with an NVIDIA driver, and TensorRT's engines live in the same primary context.
**Not run** on a GPU; the tests drive the adapter through another implementation of ``Device`` over host memory.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array, TensorSpec


class Device(Protocol):
    """The little of CUDA that the adapter needs. Every address is in bytes; sizes of 0 are allowed."""

    @property
    def name(self) -> str:
        """The device's name."""
        ...

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor number of its architecture, (9, 0) for a Hopper."""
        ...

    def make_current(self) -> None:
        """Make the device the one that this thread works on."""
        ...

    def allocate(self, nbytes: int) -> int:
        """The address of new memory; EngineError where there is none."""
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def create_stream(self) -> int:
        """The handle of a new stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        ...

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        """Enqueue a copy of a C-contiguous array to the device."""
        ...

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        """Enqueue a copy from the device into a C-contiguous array."""
        ...

    def copy_across(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy within the device."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait for the stream; EngineError if something on it failed."""
        ...


@dataclass(frozen=True)
class DeviceTensor:
    """A dense tensor that lies on the device already, in memory of somebody else.

    Attributes:
        spec: name, dtype and static shape.
        address: where it begins.
        owner: what keeps the memory alive.
    """

    spec: TensorSpec
    address: int
    owner: object


class DeviceBuffer:
    """Device memory that grows as needed and is given back when nobody holds the buffer any more."""

    def __init__(self, device: Device, nbytes: int = 0) -> None:
        self._device = device
        self._capacity = 0
        self.address = 0
        self._finalizer: weakref.finalize[[int], DeviceBuffer] | None = None
        self.reserve(max(1, nbytes))

    def reserve(self, nbytes: int) -> int:
        """Make room for so many bytes; the address, which is another one if the buffer had to grow."""
        if nbytes > self._capacity:
            self.release()
            self.address = self._device.allocate(nbytes)
            self._capacity = nbytes
            self._finalizer = weakref.finalize(self, self._device.free, self.address)
            self._finalizer.atexit = False
        return self.address

    def release(self) -> None:
        """Give the memory back now."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer, self._capacity, self.address = None, 0, 0


# cuDeviceGetAttribute numbers of the CUDA driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class CudaDevice:
    """One GPU through the CUDA driver; make one with ``open_device``."""

    def __init__(self, library: ctypes.CDLL, ordinal: int) -> None:
        self._cuda = library
        self._handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._handle), ordinal)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._handle)
        self.make_current()

    @property
    def name(self) -> str:
        """The device's name."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, 256, self._handle)
        return text.value.decode(errors="replace")

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor number of its architecture."""
        return self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR)

    def make_current(self) -> None:
        """Make the device the one that this thread works on."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, nbytes: int) -> int:
        """The address of new memory."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, nbytes)))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give memory back; waits for what uses it. Called by finalisers, from any thread."""
        self.make_current()
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def create_stream(self) -> int:
        """The handle of a new stream that does not wait for the default one."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)
        return int(stream.value or 0)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        """Enqueue a copy to the device (the driver takes pageable memory before it returns)."""
        if array.nbytes:
            source = ctypes.c_void_p(array.ctypes.data)
            size, handle = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(stream)
            self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, handle)

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        """Enqueue a copy from the device."""
        if array.nbytes:
            target = ctypes.c_void_p(array.ctypes.data)
            size, handle = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(stream)
            self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, handle)

    def copy_across(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy within the device."""
        if nbytes:
            size, handle = ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
            self._call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), size, handle)

    def synchronize(self, stream: int) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, self._handle)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cuda, function)(*arguments)
        if status:
            raise EngineError(f"{function} failed: {_error_text(self._cuda, status)}")


def _error_text(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    return (text.value or b"unknown error").decode(errors="replace") + f" (CUDA error {status})"


@cache
def _library() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        status = library.cuInit(0)
        if status:
            raise EngineError(f"the NVIDIA driver cannot be used: {_error_text(library, status)}")
        return library
    raise EngineError(
        "there is no NVIDIA driver on this machine (libcuda.so.1 was not found), and TensorRT refits and runs on a GPU",
        hint="Use engine='onnxruntime' here, or specialise the plan on the machine that will serve it",
    )


def open_device(ordinal: int = 0) -> CudaDevice:
    """A GPU of this machine; EngineError says what is missing where there is none."""
    return CudaDevice(_library(), ordinal)
