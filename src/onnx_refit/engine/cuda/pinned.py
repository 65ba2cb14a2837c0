"""Copies straight from pinned host memory: large tensors by the copy engines, small ones by one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from onnx_refit.engine.cuda.gather import Copies, Part, Table
from onnx_refit.engine.cuda.lowering.operators import Tensor

_LARGE = 512 << 10  # bytes from which a copy engine is faster than a kernel that reads host memory


class PinnedCopies:
    """Copies of tensors in pinned memory to fixed places of a storage on a GPU.

    Args:
        parts: what is expected of each tensor.
        places: bytes from the storage's beginning.
        device: the GPU.
    """

    def __init__(self, parts: Sequence[Part], places: Sequence[int], device: Any) -> None:
        self._parts, self._places = parts, places
        self._by_size = sorted(range(len(parts)), key=lambda index: -parts[index].nbytes)
        small = [index for index in self._by_size if parts[index].nbytes < _LARGE]
        self._table = Table([parts[index] for index in small], device)
        self._small = Copies(self._table, [(row, places[index]) for row, index in enumerate(small)])

    def enqueue(self, storage: Tensor, values: Sequence[Any]) -> bool:
        """Copy the values; False, some copied, if one of them is not dense in pinned memory as expected."""
        small: list[Tensor] = []
        # Large ones first: the rest is looked at while they are on their way.
        for index in self._by_size:
            part = self._parts[index]
            value = _pinned(values[index], part)
            if value is None:
                return False
            if part.nbytes < _LARGE:
                small.append(value)
            else:
                place = self._places[index]
                target = storage[place : place + part.nbytes].view(part.dtype)
                target.copy_(value.view(-1), non_blocking=True)
        if small:
            if not self._table.note(small):
                return False
            self._small.enqueue(storage)
        return True


def _pinned(value: Any, part: Part) -> Tensor | None:
    if is_host(value):
        if not (value.flags.writeable and value.flags.c_contiguous) or part.dtype is torch.bfloat16:
            return None
        value = torch.from_numpy(value)
    elif not isinstance(value, torch.Tensor):
        return None
    fits = value.dtype is part.dtype and value.shape == part.shape and value.is_contiguous()
    return value.detach() if fits and not value.is_cuda and value.is_pinned() else None


def is_host(value: Any) -> bool:
    """Whether a value is a NumPy array."""
    return hasattr(value, "flags") and hasattr(value, "ctypes")
