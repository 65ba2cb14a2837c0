"""One safetensors file, read by memory map through a strict, bounded reader of its header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype
from onnx_refit.weights.sources.mapped import MappedFile
from onnx_refit.weights.sources.strict_json import MAX_JSON_BYTES, parse_object

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8e4m3fn",
    "F8_E5M2": "float8e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_SAFE_BY_NAME = {name: code for code, name in _DTYPES.items()}
STORABLE = frozenset(_SAFE_BY_NAME)
"""The project's names of the dtypes that the format can hold."""
_MAX_RANK = 32
_AGAIN = "The file is damaged or was not written by a safetensors library: write or copy it again"


def safetensors_dtype(name: str) -> str:
    """The safetensors code of a project dtype name; WeightsError for one the format lacks."""
    code = _SAFE_BY_NAME.get(name)
    if code is None:
        raise WeightsError(f"dtype {name} cannot be stored in safetensors")
    return code


class SafetensorsSource:
    """The tensors of one safetensors file.

    Args:
        path: the file.

    Raises:
        WeightsError: it cannot be opened.
        WeightsFormatError: the header is damaged, lies about the file, or names a dtype this project lacks.
    """

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        self._path = path
        header, data_start = _read_header(self._file)
        self.metadata: Mapping[str, str] = MappingProxyType(_metadata(header.pop("__metadata__", {}), path))
        self._entries: dict[str, tuple[TensorSpec, np.dtype[np.generic], tuple[int, ...], int]] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            dtype_name, shape, start, stop = _entry(name, entry, path)
            spec = TensorSpec(name, dtype_name, shape)
            self._entries[name] = (spec, numpy_dtype(dtype_name), shape, data_start + start)
            spans.append((start, stop, name))
        _check_cover(spans, self._file.size - data_start, path)
        self._specs = MappingProxyType({name: entry[0] for name, entry in self._entries.items()})

    @property
    def description(self) -> str:
        """The path of the file."""
        return str(self._path)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor, in the order of the header."""
        return self._specs

    def read(self, name: str) -> Array:
        """One tensor, mapped from the file and read-only.

        Raises:
            WeightsError: there is no such tensor, or the source was closed.
            WeightsFormatError: the file was cut short since, or a bool tensor holds something else than 0 and 1.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise WeightsError(f"holds no tensor {name!r}", where=self._path)
        _, dtype, shape, offset = entry
        array = self._file.array(dtype, shape, offset)
        if dtype.kind == "b" and array.size and int(array.view(np.uint8).max()) > 1:
            raise WeightsFormatError(
                f"the bool tensor {name!r} holds bytes other than 0 and 1", where=self._path, hint=_AGAIN
            )
        return array

    def close(self) -> None:
        """Release the map; arrays already read stay valid."""
        self._file.close()


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where the data begins."""
    if file.size < 8:
        raise WeightsFormatError(f"{file.size} bytes are too few for safetensors", where=file.path, hint=_AGAIN)
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_JSON_BYTES:
        raise WeightsFormatError(
            f"no safetensors file: its header would take {length} bytes, {MAX_JSON_BYTES} are allowed",
            where=file.path,
            hint=_AGAIN,
        )
    if length > file.size - 8:
        raise WeightsFormatError(
            f"the header takes {length} bytes, the file has {file.size}", where=file.path, hint=_AGAIN
        )
    raw = file.bytes(8, 8 + length)
    if not raw.startswith(b"{"):
        raise WeightsFormatError("no safetensors file: the header is no JSON object", where=file.path, hint=_AGAIN)
    return parse_object(raw, what="the safetensors header", where=file.path), 8 + length


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise WeightsFormatError("__metadata__ is no mapping of text to text", where=path, hint=_AGAIN)
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape and span of one tensor of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsFormatError(
            f"tensor {name!r} is not described by dtype, shape and data_offsets", where=path, hint=_AGAIN
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise WeightsFormatError(
            f"tensor {name!r} has dtype {code!r}, which is not supported",
            where=path,
            hint=f"Supported: {', '.join(_DTYPES)}",
        )
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise WeightsFormatError(f"tensor {name!r} has no valid shape", where=path, hint=_AGAIN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise WeightsFormatError(f"tensor {name!r} has no valid data_offsets", where=path, hint=_AGAIN)
    start, stop = offsets
    if stop - start != math.prod(shape) * numpy_dtype(dtype).itemsize:
        raise WeightsFormatError(
            f"tensor {name!r} ({code} {shape}) does not take the bytes {start} to {stop} it is given",
            where=path,
            hint=_AGAIN,
        )
    return dtype, tuple(shape), start, stop


def _check_cover(spans: list[tuple[int, int, str]], size: int, path: Path) -> None:
    """Demand that the tensors fill the data without holes or overlaps."""
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps the one before it" if start < end else "leaves a hole before it"
            raise WeightsFormatError(f"tensor {name!r} {what}", where=path, hint=_AGAIN)
        end = stop
    if end != size:
        raise WeightsFormatError(f"the tensors take {end} bytes, the file has {size} of data", where=path, hint=_AGAIN)
