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
    """Copies of tensors in pinned memory to fixed places of a storage on a GPU. Not thread-safe.

    The kernel has a stream of its own, because it is told addresses: where these are new, they would wait behind the
    large copies. From the same tensors again, one stream would do as well.

    Args:
        parts: what is expected of each tensor.
        places: bytes from the storage's beginning.
        device: the GPU.
    """

    def __init__(self, parts: Sequence[Part], places: Sequence[int], device: Any) -> None:
        order = sorted(range(len(parts)), key=lambda index: -parts[index].nbytes)
        self._device = device
        self._order = order
        self._large = sum(part.nbytes >= _LARGE for part in parts)
        self._places_of_large = [(parts[index], places[index]) for index in order[: self._large]]
        small = order[self._large :]
        self._small_table = Table([parts[index] for index in small], device)
        self._small = Copies(self._small_table, [(row, places[index]) for row, index in enumerate(small)])
        self._beside = torch.cuda.Stream(device)
        self._begin, self._end = torch.cuda.Event(), torch.cuda.Event()

    def enqueue(self, storage: Tensor, values: Sequence[Any]) -> bool:
        """Copy the values; False, some copied, if one of them is not dense in pinned memory as expected."""
        here = torch.cuda.current_stream(self._device)
        self._begin.record(here)
        # Each is looked at while the one before is on its way, the largest first: of many tensors the looks take long.
        for index, (part, place) in zip(self._order, self._places_of_large, strict=False):
            tensor = as_tensor(values[index])
            if tensor is None or not is_like(tensor, part) or not tensor.is_pinned():
                return False
            target = storage[place : place + part.nbytes].view(part.dtype)
            target.copy_(tensor.detach().view(-1), non_blocking=True)
        small = [as_tensor(values[index]) for index in self._order[self._large :]]
        if any(tensor is None for tensor in small) or not self._small_table.shaped(small):
            return False
        if any(map(_IS_CUDA, small)) or not all(map(torch.Tensor.is_pinned, small)):
            return False
        self._beside.wait_event(self._begin)
        with torch.cuda.stream(self._beside):
            if not self._small_table.note(small):
                return False
            self._small.enqueue(storage)
        self._end.record(self._beside)
        here.wait_event(self._end)
        return True


def as_tensor(value: Any) -> Any:
    """A host value as a tensor over its own memory; None where that cannot be had."""
    if isinstance(value, torch.Tensor):
        return value
    if not is_host(value) or not value.flags.writeable or value.dtype.kind not in "fiub":
        return None
    return torch.from_numpy(value)


def is_like(tensor: Any, part: Part) -> bool:
    """Whether a tensor is dense and in host memory, of the expected dtype and shape."""
    return tensor.dtype is part.dtype and not tensor.is_cuda and tensor.is_contiguous() and tensor.shape == part.shape


def is_host(value: Any) -> bool:
    """Whether a value is a NumPy array."""
    return hasattr(value, "flags") and hasattr(value, "ctypes")
