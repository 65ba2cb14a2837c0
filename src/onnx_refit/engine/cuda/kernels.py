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


def source(file: str) -> str:
    """The CUDA source of a file of this package."""
    return files("onnx_refit.engine.cuda").joinpath(file).read_text()


@cache
def kernel(file: str, name: str, device: int) -> Any:
    """A compiled kernel of a file; ``name`` is the instance, ``"lstm<100>"``.

    Args:
        file: the source, ``"recurrent.cu"``.
        name: of the kernel, with template arguments.
        device: index of the GPU to compile for and to load it on.
    """
    cupy = _cupy()
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=source(file), options=("--std=c++17",), name_expressions=[name])
        return module.get_function(name)


def launch(function: Any, device: Any, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Enqueue a kernel on PyTorch's current stream of a device; pointers are plain numbers."""
    cupy = _cupy()
    stream = torch.cuda.current_stream(device).cuda_stream
    if stream == cupy.cuda.get_current_stream().ptr and cupy.cuda.runtime.getDevice() == device.index:
        function(grid, block, arguments)
        return
    index = device.index or 0
    with cupy.cuda.Device(index), _external(stream, index):
        function(grid, block, arguments)


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


def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise MissingExtraError("cupy", "cuda", "kernels of our own") from error
