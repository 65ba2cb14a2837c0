"""Many tensors copied, or looked at, by one kernel: what a call a tensor costs is most of a refit of small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.lowering.operators import Tensor

_FILE = "gather.cu"
_PIECE = np.dtype([("tensor", "<u4"), ("nbytes", "<u4"), ("from", "<u8"), ("to", "<u8")])
_PIECE_NBYTES = 32 << 10
_THREADS = 256
_ALIGNMENT = 16  # bytes, of every source
_KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
_SAMPLES = 32
_WIDEST = 8  # bytes of an element


@dataclass(frozen=True)
class Part:
    """One tensor of a batch: its bytes, and where a copy of it goes."""

    dtype: Any
    shape: tuple[int, ...]
    nbytes: int
    to: int


class Batch:
    """Tensors of given shapes that are copied or looked at together, again and again. Not thread-safe.

    Args:
        parts: what is expected of each tensor.
        device: the GPU.
    """

    def __init__(self, parts: Sequence[Part], device: Any) -> None:
        self.device = device
        self._dtypes = [part.dtype for part in parts]
        self._shapes = [torch.Size(part.shape) for part in parts]
        pieces = cut(parts)
        self._count = len(pieces)
        self._pieces = _upload(pieces, device)
        self._pointers: list[int] = []
        self._table: Any = None
        self._parts = parts
        self._looking: tuple[Tensor, Tensor] | None = None

    def fits(self, tensors: Sequence[Any]) -> bool:
        """Whether these are dense tensors of the expected dtypes and shapes where the device can read them fast."""
        return (
            all(type(tensor) in _TENSORS for tensor in tensors)
            and [tensor.shape for tensor in tensors] == self._shapes
            and [tensor.dtype for tensor in tensors] == self._dtypes
            and False not in [tensor.is_contiguous() for tensor in tensors]
            and {tensor.get_device() for tensor in tensors} <= {self.device.index}
        )

    def aligned(self, pointers: list[int]) -> bool:
        """Whether all addresses allow wide loads; takes note of them for ``copy``."""
        if pointers != self._pointers:
            table = np.array(pointers, np.uint64)
            if (np.bitwise_or.reduce(table) if len(table) else 0) % _ALIGNMENT:
                return False
            self._table = torch.from_numpy(table.view(np.int64)).to(self.device)
            self._pointers = pointers
        return True

    def copy(self, storage: Tensor) -> None:
        """Enqueue the copy of the tensors whose addresses were given last into a storage, each to its place."""
        if self._count:
            function = kernels.kernel(_FILE, "gather", self.device.index)
            arguments = (self._table.data_ptr(), self._pieces.data_ptr(), storage.data_ptr())
            kernels.launch(function, self.device, (self._count,), (_THREADS,), arguments)

    def look(self, positions: Callable[[int], npt.NDArray[np.int64]]) -> tuple[list[bool], list[bytes]]:
        """Whether each tensor is finite, and the bytes of its elements at some positions; waits for the device.

        Args:
            positions: number of elements -> up to 32 positions.
        """
        count = len(self._parts)
        where = [positions(int(np.prod(part.shape))) for part in self._parts]
        if self._looking is None:
            table = np.full((count, _SAMPLES), -1, np.int64)
            for row, chosen in zip(table, where, strict=True):
                row[: len(chosen)] = chosen
            kinds = np.array([[_KINDS.get(part.dtype, 0), part.dtype.itemsize] for part in self._parts], np.int32)
            self._looking = (_upload(table, self.device), _upload(np.ascontiguousarray(kinds.T), self.device))
        at, kinds_there = self._looking
        picked = count * _SAMPLES * _WIDEST
        found = torch.zeros(picked + 4 * count, dtype=torch.uint8, device=self.device)
        table_at = self._table.data_ptr()
        if self._count:
            arguments = (table_at, self._pieces.data_ptr(), kinds_there.data_ptr(), found.data_ptr() + picked)
            function = kernels.kernel(_FILE, "look", self.device.index)
            kernels.launch(function, self.device, (self._count,), (_THREADS,), arguments)
        arguments = (table_at, kinds_there.data_ptr() + 4 * count, at.data_ptr(), found.data_ptr())
        function = kernels.kernel(_FILE, "pick", self.device.index)
        kernels.launch(function, self.device, (count,), (_SAMPLES,), arguments)
        host = found.cpu().numpy()
        flags = host[picked:].view(np.int32)
        elements = host[:picked].reshape(count, _SAMPLES, _WIDEST)
        samples = [
            row[: len(chosen), : part.dtype.itemsize].tobytes()
            for row, chosen, part in zip(elements, where, self._parts, strict=True)
        ]
        return [not flag for flag in flags.tolist()], samples


_TENSORS = (torch.Tensor, torch.nn.Parameter)


def cut(parts: Sequence[Part]) -> npt.NDArray[Any]:
    """The pieces of all tensors, as the kernels read them."""
    pieces = [
        (index, min(_PIECE_NBYTES, part.nbytes - begin), begin, part.to + begin)
        for index, part in enumerate(parts)
        for begin in range(0, part.nbytes, _PIECE_NBYTES)
    ]
    return np.array(pieces, _PIECE)


def _upload(array: npt.NDArray[Any], device: Any) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).to(device)
