"""Many tensors copied, or looked at, by one kernel: what a call a tensor costs is most of a refit of small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.lowering.operators import Tensor

_FILES = ("gather.cu",)
_PIECE = np.dtype([("tensor", "<u4"), ("nbytes", "<u4"), ("from", "<u8"), ("to", "<u8")])
_PIECE_NBYTES = 32 << 10
_THREADS = 256
_ALIGNMENT = 16  # bytes, of every source
KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
"""How kernels tell floating-point dtypes apart; they look at no others."""

_TENSORS = {torch.Tensor, torch.nn.Parameter}
_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")


@dataclass(frozen=True)
class Part:
    """What is expected of one tensor: PyTorch's dtype, shape and bytes."""

    dtype: Any
    shape: tuple[int, ...]
    nbytes: int


class Table:
    """The addresses of tensors of given shapes, on a GPU. Not thread-safe.

    Args:
        parts: what is expected of each tensor.
        device: the GPU.
    """

    def __init__(self, parts: Sequence[Part], device: Any) -> None:
        self.device = device
        self.parts = parts
        self._devices = {device.index}
        self._dtypes = [part.dtype for part in parts]
        self._shapes = [torch.Size(part.shape) for part in parts]
        self._pointers: list[int] | None = None
        self._there: Any = None

    def fits(self, tensors: Sequence[Any]) -> bool:
        """Whether these are dense tensors of the expected dtypes and shapes on the device."""
        # Loops in C where possible: this is what a refit of many small tensors consists of.
        return (
            set(map(type, tensors)) <= _TENSORS
            and set(map(torch.Tensor.get_device, tensors)) <= self._devices
            and self.shaped(tensors)
        )

    def shaped(self, tensors: Sequence[Any]) -> bool:
        """Whether these tensors are dense, of the expected dtypes and shapes, wherever they are."""
        return (
            list(map(_DTYPE, tensors)) == self._dtypes
            and False not in map(torch.Tensor.is_contiguous, tensors)
            and list(map(_SHAPE, tensors)) == self._shapes
        )

    def note(self, tensors: Sequence[Any]) -> bool:
        """Take the addresses of these for the next kernels; False if one does not allow wide loads."""
        pointers = list(map(torch.Tensor.data_ptr, tensors))
        if pointers != self._pointers:
            table = np.array(pointers, np.uint64)
            if (np.bitwise_or.reduce(table) if len(table) else 0) % _ALIGNMENT:
                return False
            self._there = torch.from_numpy(table.view(np.int64)).to(self.device)
            self._pointers = pointers
        return True

    def has(self, tensors: Sequence[Any]) -> bool:
        """Whether the addresses of these are the ones noted last."""
        return list(map(torch.Tensor.data_ptr, tensors)) == self._pointers

    @property
    def address(self) -> int:
        """Of the addresses on the device."""
        return int(self._there.data_ptr())


class Copies:
    """Copies of tensors of a table to fixed places of a storage.

    Args:
        table: the tensors.
        places: which of them goes where: index in the table, bytes from the storage's beginning.
    """

    def __init__(self, table: Table, places: Sequence[tuple[int, int]]) -> None:
        self._table = table
        pieces = cut(table.parts, places)
        self._count = len(pieces)
        self._pieces = upload(pieces, table.device)
        self._kernel = kernels.kernel(_FILES, "gather", table.device.index)

    def enqueue(self, storage: Tensor) -> None:
        """Copy the tensors noted last."""
        if self._count:
            arguments = (self._table.address, self._pieces.data_ptr(), storage.data_ptr())
            kernels.launch(self._kernel, self._table.device, (self._count,), (_THREADS,), arguments)


def cut(parts: Sequence[Part], places: Sequence[tuple[int, int]]) -> npt.NDArray[Any]:
    """The pieces of tensors that go to these places, as the kernels read them."""
    counts = np.array([-(-parts[index].nbytes // _PIECE_NBYTES) for index, _ in places], np.int64)
    rows = np.repeat(np.arange(len(places)), counts)
    begins = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * _PIECE_NBYTES
    sizes = np.array([parts[index].nbytes for index, _ in places], np.int64)[rows]
    pieces = np.zeros(len(rows), _PIECE)
    pieces["tensor"] = np.array([index for index, _ in places], np.int64)[rows]
    pieces["nbytes"] = np.minimum(_PIECE_NBYTES, sizes - begins)
    pieces["from"] = begins
    pieces["to"] = np.array([to for _, to in places], np.uint64)[rows] + begins.astype(np.uint64)
    return pieces


def upload(array: npt.NDArray[Any], device: Any) -> Tensor:
    """The bytes of an array on a device."""
    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).to(device)
