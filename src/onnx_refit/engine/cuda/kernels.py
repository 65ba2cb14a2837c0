"""Kernels of our own, compiled at run time by CuPy (NVRTC) and launched on PyTorch's current stream."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from onnx_refit.errors import MissingExtraError

_BESIDE = -1


@cache
def available() -> bool:
    """Whether CuPy is installed."""
    try:
        _cupy()
    except MissingExtraError:
        return False
    return True


def source(*names: str) -> str:
    """The CUDA source of some files of this package, one after the other."""
    folder = files("onnx_refit.engine.cuda")
    return "\n".join(folder.joinpath(name).read_text() for name in names)


@cache
def kernel(files: tuple[str, ...], name: str, device: int) -> Any:
    """A compiled kernel; ``name`` is the instance, ``"lstm<100, 4>"``.

    Args:
        files: the sources, read as one: ``("recurrent_common.cu", "recurrent.cu")``.
        name: of the kernel, with template arguments.
        device: index of the GPU to compile for and to load it on.
    """
    return compiled(source(*files), name, device)


@cache
def compiled(code: str, name: str, device: int, *, fused: bool = True) -> Any:
    """A compiled kernel of a text.

    Args:
        code: the source.
        name: of the kernel.
        device: index of the GPU.
        fused: whether a product and a sum may be rounded once; without it, results are those of single operators.
    """
    cupy = _cupy()
    options = ("--std=c++17", f"--fmad={'true' if fused else 'false'}")
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=code, options=options, name_expressions=[name])
        return module.get_function(name).kernel


def launch(function: Any, device: Any, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Enqueue a kernel on PyTorch's current stream of a device; pointers are plain numbers."""
    cupy, index = _cupy(), device.index or 0
    stream = torch._C._cuda_getCurrentRawStream(index)
    if stream == cupy.cuda.get_current_stream().ptr and torch._C._cuda_getDevice() == index:
        function(grid, block, arguments)
        return
    with cupy.cuda.Device(index), _external(stream, index):
        function(grid, block, arguments)


class Prepared:
    """A kernel with its grid and most of its arguments, each of 8 bytes: a launch costs a third. Not thread-safe.

    Args:
        function: the kernel.
        device: the GPU.
        grid: blocks.
        block: threads of a block.
        fixed: the first arguments, the same at each launch.
        others: how many follow.
    """

    def __init__(self, function: Any, device: Any, grid: int, block: int, fixed: Sequence[int], others: int) -> None:
        self._function, self._device, self._grid, self._block = function, device, grid, block
        self._fixed = tuple(fixed)
        self._values = np.zeros(len(fixed) + others, np.uint64)
        self._values[: len(fixed)] = fixed
        begin = self._values.ctypes.data
        self._places = np.array([begin + 8 * place for place in range(len(self._values))], np.uint64)
        self._others = memoryview(self._values).cast("B")[8 * len(fixed) :]  # type: ignore[arg-type]
        self._write = struct.Struct(f"{others}Q").pack_into
        launcher = getattr(_cupy().cuda.driver, "launchKernel", None)
        self._pointer = getattr(function, "ptr", None)
        self._launcher = launcher if self._pointer is not None else None
        self._parameters = self._places.ctypes.data

    def __call__(self, stream: int, *others: int) -> None:
        """Enqueue it on a stream of the current device, which is the kernel's."""
        if self._launcher is None:
            launch(self._function, self._device, (self._grid,), (self._block,), (*self._fixed, *others))
            return
        self._write(self._others, 0, *others)
        self._launcher(self._pointer, self._grid, 1, 1, self._block, 1, 1, 0, stream, self._parameters, 0)


class Beside:
    """A second stream of the current device, for small kernels beside a large one; requests go before both.

    Args:
        device: the GPU.

    Attributes:
        stream: as a plain number.
        busy: whether anything was enqueued on it since it was waited for.
    """

    def __init__(self, device: Any) -> None:
        cupy = _cupy()
        # Small kernels go before what the large one has not begun: else they would only run in its end.
        self._own = torch.cuda.Stream(device, priority=_BESIDE)
        self.stream: int = self._own.cuda_stream
        with cupy.cuda.Device(device.index):
            self._event = cupy.cuda.Event(disable_timing=True)
        self._runtime = cupy.cuda.runtime
        self.busy = False

    def mark(self, stream: int) -> None:
        """Note what is enqueued on a stream so far."""
        self.busy = True
        self._runtime.eventRecord(self._event.ptr, stream)

    def follow(self) -> None:
        """Wait, on the second stream, for what was noted."""
        self._runtime.streamWaitEvent(self.stream, self._event.ptr)

    def wait(self) -> None:
        """Wait for the second stream, where anything was enqueued on it."""
        if self.busy:
            self._runtime.streamSynchronize(self.stream)
            self.busy = False


def current_stream(device: Any) -> int:
    """PyTorch's current stream of a device, as a plain number."""
    stream: int = torch._C._cuda_getCurrentRawStream(device.index or 0)
    return stream


def wait(stream: int) -> None:
    """Wait for a stream of the current device."""
    _cupy().cuda.runtime.streamSynchronize(stream)


def waiter() -> Callable[[int], None]:
    """What ``wait`` calls: for those to whom a call counts."""
    wait: Callable[[int], None] = _cupy().cuda.runtime.streamSynchronize
    return wait


def synchronize(device: Any) -> None:
    """Wait for PyTorch's current stream of a device."""
    if available():
        _cupy().cuda.runtime.streamSynchronize(torch._C._cuda_getCurrentRawStream(device.index or 0))
    else:
        torch.cuda.current_stream(device).synchronize()


@cache
def _external(stream: int, device: int) -> Any:
    made = getattr(_cupy().cuda.Stream, "from_external", None)  # CuPy 14; ExternalStream before
    return _cupy().cuda.ExternalStream(stream) if made is None else made(_Handle(stream))


class _Handle:
    """A stream as the CUDA stream protocol has it."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@cache
def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise MissingExtraError("cupy", "cuda", "kernels of our own") from error
