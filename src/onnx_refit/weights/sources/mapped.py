"""A file mapped into memory, from which tensors are taken without copying."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.tensors import Array


def unreadable(path: Path, error: OSError) -> WeightsError:
    """Say in words why the operating system would not let a checkpoint be read."""
    if isinstance(error, FileNotFoundError):
        return WeightsError("no such file", where=path, hint="Check the path")
    if isinstance(error, IsADirectoryError):
        return WeightsError("it is a directory, not a file", where=path)
    if isinstance(error, PermissionError):
        return WeightsError("permission denied", where=path, hint="Make the file readable")
    return WeightsError(f"cannot be read: {error.strerror or error}", where=path)


class MappedFile:
    """A read-only memory map of one file.

    Args:
        path: the file; it must not be empty.

    Raises:
        WeightsError: it cannot be opened.
        WeightsFormatError: it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise WeightsFormatError("the file is empty", where=path, hint="Write the checkpoint again")
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(path, error) from error

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of the bytes ``[start, stop)``; WeightsFormatError where the file ends before."""
        return self._open(start, stop)[start:stop]

    def array(self, dtype: np.dtype[np.generic], shape: tuple[int, ...], offset: int) -> Array:
        """A tensor at a byte offset, C order, native or foreign endianness as ``dtype`` says.

        The array shares the file's pages, is read-only and keeps the map alive; it is a copy only where the offset
        is no multiple of the element size.

        Raises:
            WeightsFormatError: the file ends before the tensor does.
        """
        count = math.prod(shape)
        mapped = self._open(offset, offset + count * dtype.itemsize)
        if count == 0:
            return np.empty(shape, dtype)
        array: Array = np.frombuffer(mapped, dtype, count, offset)
        if offset % dtype.alignment:
            array = array.copy()
        return array.reshape(shape)

    def close(self) -> None:
        """Let go of the map; it lives on while arrays taken from it do."""
        self._map = None

    def _open(self, start: int, stop: int) -> mmap.mmap:
        if self._map is None:
            raise WeightsError("the checkpoint was closed", where=self.path)
        # A page beyond the end of the file would kill the process when touched: look at the size each time.
        if not 0 <= start <= stop <= self.size or self._map.size() < stop:
            raise WeightsFormatError(
                f"the file ends at byte {min(self.size, self._map.size())}, within bytes {start} to {stop} of a tensor",
                where=self.path,
                hint="It was cut short: copy it again",
            )
        return self._map
