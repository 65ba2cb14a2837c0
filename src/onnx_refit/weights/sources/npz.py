"""NumPy's npz archives, never unpickled; members stored uncompressed are read by memory map."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from onnx_refit.errors import ModelError, WeightsError, WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec, dtype_name
from onnx_refit.weights.sources.mapped import MappedFile, unreadable

_LOCAL_HEADER = struct.Struct("<4s5HIIIHH")
_HEADER_READ = 70_000  # magic, version, length and a header of at most 65,535 bytes
_MAX_HEADER = 10_000  # NumPy's own limit on what it will parse
_AGAIN = "The archive is damaged: write or copy it again"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, RuntimeError, OSError)


@dataclass(frozen=True)
class _Member:
    spec: TensorSpec
    dtype: np.dtype[np.generic]  # as stored, perhaps of foreign endianness
    shape: tuple[int, ...]
    fortran: bool
    info: zipfile.ZipInfo
    data_start: int  # within the member


class NpzSource:
    """The arrays of one npz archive (or the single array of an npy file inside it).

    Args:
        path: the archive.

    Raises:
        WeightsError: it cannot be opened.
        WeightsFormatError: it is damaged, encrypted, or holds objects (which only unpickling could read).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = MappedFile(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise unreadable(path, error) from error
        except (*_DAMAGED, ValueError) as error:
            raise WeightsFormatError(f"no npz archive: {error}", where=path, hint=_AGAIN) from error
        self._members: dict[str, _Member] = {}
        try:
            for info in self._zip.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename:
                    raise WeightsFormatError(f"member {name!r} is no .npy array", where=path, hint=_AGAIN)
                if name in self._members:
                    raise WeightsFormatError(f"tensor {name!r} occurs twice", where=path, hint=_AGAIN)
                self._members[name] = self._inspect(name, info)
        except BaseException:
            self.close()
            raise
        self._specs = MappingProxyType({name: member.spec for name, member in self._members.items()})

    @property
    def description(self) -> str:
        """The path of the archive."""
        return str(self._path)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every array, in the order of the archive."""
        return self._specs

    def read(self, name: str) -> Array:
        """One array, checksum verified; mapped from the file where it is stored uncompressed.

        Raises:
            WeightsError: there is no such tensor, or the source was closed.
            WeightsFormatError: the member is damaged or its checksum is wrong.
        """
        member = self._members.get(name)
        if member is None:
            raise WeightsError(f"holds no tensor {name!r}", where=self._path)
        if member.info.compress_type == zipfile.ZIP_STORED:
            flat = self._mapped(name, member)
        else:
            flat = self._unpacked(name, member)
        if member.dtype.kind == "b" and flat.size and int(flat.view(np.uint8).max()) > 1:
            raise self._damaged(name, "a bool array holds bytes other than 0 and 1")
        if not member.dtype.isnative:
            flat = flat.astype(member.dtype.newbyteorder("="))
        return flat.reshape(member.shape, order="F" if member.fortran else "C")

    def close(self) -> None:
        """Release the archive; arrays already read stay valid."""
        self._zip.close()
        self._file.close()

    def _damaged(self, name: str, reason: object) -> WeightsFormatError:
        return WeightsFormatError(f"tensor {name!r} cannot be read: {reason}", where=self._path, hint=_AGAIN)

    def _inspect(self, name: str, info: zipfile.ZipInfo) -> _Member:
        """Read the header of one member, and nothing else of it."""
        if info.flag_bits & 1:
            raise self._damaged(name, "it is encrypted")
        try:
            with self._zip.open(info) as stream:
                head = io.BytesIO(stream.read(_HEADER_READ))
            version = np.lib.format.read_magic(head)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"npy format version {version}")
            shape, fortran, dtype = _read_npy_header(head, version)
        except (*_DAMAGED, ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
            raise self._damaged(name, error) from error
        if dtype.hasobject:
            raise WeightsFormatError(
                f"tensor {name!r} holds Python objects, which only unpickling could read",
                where=self._path,
                hint="Unpickling runs code of the file's author, so it is never done: save plain numeric arrays",
            )
        try:
            if dtype.kind in "USV" or dtype.fields is not None or dtype.subdtype is not None:
                raise ModelError(f"dtype {dtype} is not numeric")
            project_name = dtype_name(dtype.newbyteorder("="))
        except ModelError as error:
            raise WeightsFormatError(
                f"tensor {name!r}: {error.message}",
                where=self._path,
                hint="npz cannot hold bfloat16 or float8: use safetensors for those" if dtype.kind == "V" else None,
            ) from error
        start = head.tell()
        if start + math.prod(shape) * dtype.itemsize != info.file_size:
            raise self._damaged(name, f"{shape} of {dtype} does not fill its {info.file_size} bytes")
        return _Member(TensorSpec(name, project_name, shape), dtype, shape, fortran, info, start)

    def _mapped(self, name: str, member: _Member) -> Array:
        info = member.info
        header = _LOCAL_HEADER.unpack(self._file.bytes(info.header_offset, info.header_offset + _LOCAL_HEADER.size))
        if header[0] != b"PK\x03\x04" or info.compress_size != info.file_size:
            raise self._damaged(name, "the archive contradicts itself")
        start = info.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
        whole = self._file.array(np.dtype(np.uint8), (info.file_size,), start)
        if zlib.crc32(whole) != info.CRC:  # type: ignore[arg-type]
            raise self._damaged(name, "its checksum is wrong")
        return self._file.array(member.dtype, (math.prod(member.shape),), start + member.data_start)

    def _unpacked(self, name: str, member: _Member) -> Array:
        if self._zip.fp is None:
            raise WeightsError("the checkpoint was closed", where=self._path)
        try:
            buffer = np.empty(member.info.file_size - member.data_start, np.uint8)
            with self._zip.open(member.info) as stream:
                stream.read(member.data_start)
                view, done = buffer.data, 0
                while done < len(view):
                    chunk = stream.read(min(len(view) - done, 1 << 20))
                    if not chunk:
                        raise EOFError("it ends early")
                    view[done : done + len(chunk)] = chunk
                    done += len(chunk)
                if stream.read(1):  # also makes zipfile compare the checksum
                    raise EOFError("it is longer than it says")
        except (*_DAMAGED, ValueError, MemoryError) as error:
            raise self._damaged(name, error) from error
        return buffer.view(member.dtype)


def _read_npy_header(head: io.BytesIO, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, Fortran order and dtype of an npy header; ValueError where it is none."""
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head, max_header_size=_MAX_HEADER)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(head, max_header_size=_MAX_HEADER)
    if len(shape) > 32 or not all(type(d) is int and 0 <= d < 1 << 63 for d in shape):
        raise ValueError(f"{shape} is no shape")
    return shape, fortran, dtype
