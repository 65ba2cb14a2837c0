"""Copies straight from pinned host memory: large tensors by the copy engines, small ones by one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch

from onnx_refit.engine.cuda.gather import Copies, Part, Table
from onnx_refit.engine.cuda.lowering.operators import Tensor

_IS_CUDA = attrgetter("is_cuda")
_LARGE = 512 << 10  # bytes from which a copy engine is faster than a kernel that reads host memory


class PinnedCopies:
    """Copies of tensors in pinned memory to fixed places of a storage on a GPU.

    Args:
        parts: what is expected of each tensor.
        places: bytes from the storage's beginning.
        device: the GPU.
    """

    def __init__(self, parts: Sequence[Part], places: Sequence[int], device: Any) -> None:
        order = sorted(range(len(parts)), key=lambda index: -parts[index].nbytes)
        self._order = order
        self._places = [places[index] for index in order]
        self._table = Table([parts[index] for index in order], device)
        self._large = sum(part.nbytes >= _LARGE for part in parts)
        self._small_table = Table(self._table.parts[self._large :], device)
        self._small = Copies(self._small_table, list(enumerate(self._places[self._large :])))

    def enqueue(self, storage: Tensor, values: Sequence[Any]) -> bool:
        """Copy the values; False, some copied, if one of them is not dense in pinned memory as expected."""
        tensors = [as_tensor(values[index]) for index in self._order]
        if any(tensor is None for tensor in tensors) or not self._table.shaped(tensors):
            return False
        # Large ones first: the rest is looked at while they are on their way.
        for tensor, part, place in zip(tensors, self._table.parts, self._places, strict=False):
            if part.nbytes < _LARGE:
                break
            if tensor.is_cuda or not tensor.is_pinned():
                return False
            target = storage[place : place + part.nbytes].view(part.dtype)
            target.copy_(tensor.detach().view(-1), non_blocking=True)
        small = tensors[self._large :]
        if any(map(_IS_CUDA, small)) or not all(map(torch.Tensor.is_pinned, small)):
            return False
        if not self._small_table.note(small):
            return False
        self._small.enqueue(storage)
        return True


def as_tensor(value: Any) -> Any:
    """A host value as a tensor over its own memory; None where that cannot be had."""
    if isinstance(value, torch.Tensor):
        return value
    if not is_host(value) or not value.flags.writeable or value.dtype.kind not in "fiub":
        return None
    return torch.from_numpy(value)


def is_host(value: Any) -> bool:
    """Whether a value is a NumPy array."""
    return hasattr(value, "flags") and hasattr(value, "ctypes")
