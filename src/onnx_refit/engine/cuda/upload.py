"""Source weights to the device: from host arrays through pinned buffers, from other libraries without the host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda.arena import Arena
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array, TensorSpec, dtype_name


def as_bytes(array: Array) -> Array:
    """The bytes of an array, uint8 [nbytes], without a copy if it is C-contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def from_dlpack(source: object, spec: TensorSpec) -> Tensor:
    """A tensor of another library over its own memory.

    Args:
        source: anything with ``__dlpack__``: a tensor of PyTorch, CuPy, JAX.
        spec: what it must be.

    Raises:
        EngineError: it has another dtype or shape, or cannot be shared.
    """
    try:
        tensor = source if isinstance(source, torch.Tensor) else torch.from_dlpack(source)
    except (RuntimeError, TypeError, BufferError) as error:
        raise EngineError(f"the tensor cannot be shared: {error}", where=spec.name) from error
    if tuple(tensor.shape) != spec.static_shape or tensor.dtype is not torch_dtype(spec.dtype, spec.name):
        raise EngineError(f"it is {tensor.dtype} {list(tensor.shape)}, the engine takes {spec}", where=spec.name)
    return tensor.detach()


_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
_SPLIT = 4 << 20  # bytes from which a copy is worth several threads


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="onnx-refit-upload")


Copy = tuple[Array, Array]
"""Bytes to write, and the bytes to write there."""


def _copy(copies: list[Copy]) -> None:
    """Copy bytes within the host, by several threads where there are many: one cannot keep up with the bus."""
    total = sum(len(part) for _, part in copies)
    if total < _SPLIT or _THREADS == 1:
        for target, part in copies:
            np.copyto(target, part)
        return
    share = -(-total // _THREADS)
    jobs: list[list[Copy]] = [[]]
    left = share
    for target, part in copies:
        begin = 0
        while begin < len(part):
            size = min(left, len(part) - begin)
            jobs[-1].append((target[begin : begin + size], part[begin : begin + size]))
            begin += size
            left -= size
            if not left:
                jobs.append([])
                left = share
    for done in [_pool().submit(_copy_all, job) for job in jobs if job]:
        done.result()


def _copy_all(copies: list[Copy]) -> None:
    for target, part in copies:
        np.copyto(target, part)


class Uploader:
    """Copies host arrays to the device through two pinned buffers: one is filled while the other is on its way.

    Args:
        device: the device; on the CPU the buffers are ordinary memory.
        chunk: bytes of each buffer.
    """

    def __init__(self, device: Any, chunk: int) -> None:
        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        self._chunk = max(1, chunk)
        self._buffers: list[Tensor] = []
        self._events: list[Any] = []
        self._turn = 0

    def _buffer(self) -> tuple[Tensor, int]:
        if len(self._buffers) < 2:
            self._buffers.append(torch.empty(self._chunk, dtype=torch.uint8, pin_memory=self._pinned))
            self._events.append(torch.cuda.Event() if self._pinned else None)
            self._turn = len(self._buffers) - 1
        else:
            self._turn ^= 1
            if self._events[self._turn] is not None:
                self._events[self._turn].synchronize()
        return self._buffers[self._turn], self._turn

    def fill(self, arena: Arena, arrays: Mapping[str, Array]) -> None:
        """Enqueue the upload of these engine weights into an arena, in pieces of the arena as it lies.

        Small tensors that lie side by side travel together; a large one travels in several pieces. Bytes of other
        slots between them are overwritten, so whatever else goes into the arena must come later.

        Args:
            arena: where to.
            arrays: engine weight name -> array of exactly the slot's dtype and shape.
        """
        slots = sorted((arena.layout.slots[name] for name in arrays), key=lambda slot: slot.offset)
        pending = [(slot.offset, as_bytes(arrays[slot.spec.name])) for slot in slots if slot.nbytes]
        while pending:
            begin = pending[0][0]
            buffer, turn = self._buffer()
            memory = buffer.numpy()
            copies: list[Copy] = []
            end = begin
            while pending and pending[0][0] < begin + self._chunk:
                offset, data = pending[0]
                if offset - end > self._chunk // 2:
                    break  # a gap that is not worth sending
                room = begin + self._chunk - offset
                part = data[:room]
                copies.append((memory[offset - begin : offset - begin + len(part)], part))
                end = offset + len(part)
                pending.pop(0)
                if len(part) < len(data):
                    pending.insert(0, (end, data[room:]))
                    break
            _copy(copies)
            there = arena.storage[arena.begin + begin : arena.begin + end]
            there.copy_(buffer[: end - begin], non_blocking=self._pinned)
            if self._events[turn] is not None:
                self._events[turn].record()

    def tensor(self, spec: TensorSpec, array: Array) -> Tensor:
        """A new tensor on the device with an array's values."""
        if dtype_name(array.dtype) != spec.dtype or tuple(array.shape) != spec.static_shape:
            raise EngineError(
                f"it is {dtype_name(array.dtype)} {list(array.shape)}, the plan declares {spec}", where=spec.name
            )
        data, flat = as_bytes(array), torch.empty(max(1, array.nbytes), dtype=torch.uint8, device=self._device)
        for begin in range(0, array.nbytes, self._chunk):
            part = data[begin : begin + self._chunk]
            buffer, turn = self._buffer()
            _copy([(buffer.numpy()[: len(part)], part)])
            flat[begin : begin + len(part)].copy_(buffer[: len(part)], non_blocking=self._pinned)
            if self._events[turn] is not None:
                self._events[turn].record()
        return flat[: array.nbytes].view(torch_dtype(spec.dtype, spec.name)).view(spec.static_shape)
