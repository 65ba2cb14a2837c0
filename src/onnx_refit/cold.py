"""Bytes that are seldom wanted, on disk instead of in memory: an unlinked temporary file of this process.

Nothing in it outlives the process, and nobody else can open it. What is read back is checked against the checksum of
what was written. A temporary folder that is itself memory (tmpfs) is refused: it would give nothing back.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array

_SLICE = 1 << 16  # bytes written or read at once; a thread's own memory, once so large, is never given back
_ALIGNMENT = 4096
_MEMORY = frozenset({"tmpfs", "ramfs"})


class NoDiskError(OSError):
    """Nothing can be moved to disk; the message says why, a clause without a final stop."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Where an array lies in the file, and the checksum of its bytes."""

    begin: int
    nbytes: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    checksum: int


class ColdBlock(Mapping[str, Array]):
    """Arrays on disk, each read from there when asked for: a new array that nobody can write to.

    Its place in the file is used again once the block is gone.
    """

    def __init__(self, file: ColdFile, extent: tuple[int, int], parts: Mapping[str, _Part]) -> None:
        self._file, self._extent, self._parts = file, extent, parts

    def __getitem__(self, name: str) -> Array:
        part = self._parts[name]
        raw = np.empty(part.nbytes, np.uint8)
        try:
            read = self._file.read_into(part.begin, raw.data)
        except OSError as error:
            raise _lost(name, error.strerror or str(error)) from error
        if read < part.nbytes:
            raise _lost(name, "the file is shorter than what was written to it")
        if zlib.crc32(raw.data) != part.checksum:
            raise _lost(name, "its checksum is not that of what was written")
        array: Array = raw.view(part.dtype).reshape(part.shape)
        array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __del__(self) -> None:
        # In any thread: no lock may be taken here.
        self._file.dead.append(self._extent)


def _lost(name: str, reason: str) -> WeightsError:
    return WeightsError(
        f"a weight that was moved out of memory cannot be read back from disk: {reason}",
        where=name,
        hint="Refit with all weights, or load the engine with cold='memory'",
    )


class ColdFile:
    """One temporary file for any number of blocks. Thread-safe.

    Attributes:
        dead: the extents of blocks that are gone.

    Args:
        folder: where to make it; None takes the system's temporary folder (``TMPDIR``).

    Raises:
        NoDiskError: there is no folder to write to, or it is memory.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.dead: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = []
        self._end = 0
        try:
            where = folder if folder is not None else tempfile.gettempdir()
            descriptor, path = tempfile.mkstemp(prefix="onnx-refit-cold-", dir=where)  # mode 0600
        except OSError as error:
            raise NoDiskError(f"no temporary file can be made ({error.strerror or error})") from error
        # Windows unlinks no open file: there it goes with the process that closes it.
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._path = None if _unlinked(path) else path
        kind = _file_system(os.fstat(descriptor).st_dev)
        if kind in _MEMORY:
            self.close()
            raise NoDiskError(f"the temporary folder {where} is memory itself ({kind})")

    def store(self, arrays: Mapping[str, Array]) -> ColdBlock:
        """Write C-contiguous arrays, and read them back to be sure of them.

        Raises:
            NoDiskError: the disk does not take them; nothing of them is kept.
        """
        begin = self._take(sum(_up(array.nbytes) for array in arrays.values()))
        parts: dict[str, _Part] = {}
        place = begin
        block = ColdBlock(self, (begin, begin), {})
        for name, array in arrays.items():
            # ml_dtypes' elements have no buffer of their own.
            raw = array.reshape(-1).view(np.uint8)
            block._extent = (begin, place + _up(array.nbytes))
            try:
                checksum = self._write(place, raw.data)
            except OSError as error:
                raise NoDiskError(f"the disk does not take it ({error.strerror or error})") from error
            parts[name] = _Part(place, array.nbytes, array.dtype, array.shape, checksum)
            place += _up(array.nbytes)
        block._parts = parts
        return block

    def _write(self, begin: int, data: memoryview) -> int:
        checksum, place = 0, begin
        for cut in range(0, len(data), _SLICE):
            piece = data[cut : cut + _SLICE]
            checksum = zlib.crc32(piece, checksum)
            while piece:
                written = os.pwrite(self._file.fileno(), piece, place)
                piece, place = piece[written:], place + written
        again, buffer = 0, bytearray(min(_SLICE, len(data)))
        for cut in range(0, len(data), _SLICE):
            piece = memoryview(buffer)[: min(_SLICE, len(data) - cut)]
            if self.read_into(begin + cut, piece) < len(piece):
                raise OSError("what was written cannot be read back")
            again = zlib.crc32(piece, again)
        if again != checksum:
            raise OSError("what was written reads back otherwise")
        return checksum

    def read_into(self, begin: int, target: memoryview) -> int:
        """Fill a buffer from a place in the file; how many bytes there were."""
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done : done + _SLICE]], begin + done)
            if count == 0:
                break
            done += count
        return done

    def _take(self, nbytes: int) -> int:
        """The first byte of a free extent."""
        with self._lock:
            while self.dead:
                self._free.append(self.dead.pop())
            self._free = _merged(self._free)
            if self._free and self._free[-1][1] == self._end:  # the file ends with nothing: give it back
                self._end = self._free.pop()[0]
                os.ftruncate(self._file.fileno(), self._end)
            for index, (begin, end) in enumerate(self._free):
                if end - begin >= nbytes:
                    self._free[index] = (begin + nbytes, end)
                    return begin
            begin, self._end = self._end, self._end + nbytes
            return begin

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()
        if self._path is not None:
            Path(self._path).unlink(missing_ok=True)

    def __del__(self) -> None:
        if hasattr(self, "_file") and not self._file.closed:
            self.close()


def _unlinked(path: str) -> bool:
    try:
        Path(path).unlink()
    except OSError:
        return False
    return True


def _up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents in order, neighbours as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(extents):
        if begin == end:
            continue
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def _file_system(device: int) -> str | None:
    """The type of the file system of a device number; None where it cannot be told."""
    if sys.platform != "linux":
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return None
