"""Kernels of our own, compiled at run time by CuPy (NVRTC) and launched on PyTorch's current stream."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from onnx_refit.errors import MissingExtraError


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
