"""The protocol's datatypes, and arrays as the protocol sends them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from onnx_refit.errors import InputError
from onnx_refit.tensors import Array, numpy_dtype

# Open Inference Protocol, "Tensor Data Types"; BF16 from Triton's binary tensor extension.
_BY_NAME = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BF16": "bfloat16",
    "BYTES": "string",
}
_BY_DTYPE = {name: datatype for datatype, name in _BY_NAME.items()}
_NUMPY = {datatype: numpy_dtype(name) for datatype, name in _BY_NAME.items()}
_DATATYPE = {dtype: datatype for datatype, dtype in _NUMPY.items()}
_MAX_RANK = 32
# What JSON may hold for a kind of dtype; floats take both.
_ELEMENTS: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "O": {str}}


def datatype_of(dtype: str) -> str:
    """The protocol's name of a project dtype; InputError for one it lacks (float8, int4, complex)."""
    datatype = _BY_DTYPE.get(dtype)
    if datatype is None:
        raise InputError(f"the protocol has no datatype for {dtype}")
    return datatype


def datatype_of_array(array: Array) -> str:
    """The protocol's name of an array's dtype."""
    known = _DATATYPE.get(array.dtype)
    if known is not None:
        return known
    return "BYTES" if array.dtype.kind in "OUS" else datatype_of(str(array.dtype))


def dtype_of(datatype: object, where: str) -> np.dtype[np.generic]:
    """The NumPy dtype of a protocol datatype; InputError for an unknown one."""
    dtype = _NUMPY.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise InputError(f"there is no datatype {datatype!r}", where=where, hint=f"Known are {', '.join(_NUMPY)}")
    return dtype


def checked_shape(shape: object, where: str) -> tuple[int, ...]:
    """A shape from a client; InputError unless it is a short list of non-negative integers that fit into 63 bits."""
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes) or len(shape) > _MAX_RANK:
        raise InputError("the shape is not a list of integers", where=where)
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension < 1 << 48:
            raise InputError(f"the shape holds {dimension!r}, which is no dimension", where=where)
    if math.prod(shape) >= 1 << 48:
        raise InputError("the shape is too large", where=where)
    return tuple(shape)


def array_from_list(data: object, datatype: object, shape: tuple[int, ...], where: str) -> Array:
    """An array from JSON numbers, flat or nested; InputError unless every value fits the datatype exactly in kind."""
    dtype = dtype_of(datatype, where)
    flat = _flattened(data, where)
    if len(flat) != math.prod(shape):
        raise InputError(
            f"the data has {len(flat)} elements, the shape {list(shape)} has {math.prod(shape)}", where=where
        )
    # Looked at by type before NumPy sees them: it would read text as numbers, truncate, and pad text to the longest.
    if not set(map(type, flat)) <= _ELEMENTS.get(dtype.kind, {int, float}):
        raise InputError(f"the data does not fit the datatype {datatype}", where=where)
    if dtype.kind == "O":
        return _objects(flat, shape, where)
    try:
        if dtype.kind in "iub":
            return np.array(flat, dtype).reshape(shape)
        with np.errstate(over="ignore"):
            result = np.array(flat, np.float64).astype(dtype).reshape(shape)
    except OverflowError as error:
        raise InputError(f"the data holds values outside {datatype}", where=where) from error
    if not np.isfinite(result).all():
        raise InputError(f"the data holds values outside {datatype}", where=where)
    return result


def _flattened(data: object, where: str) -> list[Any]:
    """The elements of a list that may be nested; InputError where it is ragged."""
    if not isinstance(data, list):
        raise InputError("the data is not a list", where=where)
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise InputError("the data is ragged", where=where)
        data = list(chain.from_iterable(data))
    return data


def _objects(flat: Sequence[str], shape: tuple[int, ...], where: str) -> Array:
    if len(flat) != math.prod(shape):
        raise InputError(
            f"the data has {len(flat)} elements, the shape {list(shape)} has {math.prod(shape)}", where=where
        )
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.reshape(shape)


def array_from_bytes(data: memoryview | bytes, datatype: object, shape: tuple[int, ...], where: str) -> Array:
    """An array over raw little-endian bytes (not copied); InputError unless they are exactly the tensor's."""
    dtype = dtype_of(datatype, where)
    if dtype.kind == "O":
        return _objects(_split(bytes(data), where), shape, where)
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise InputError(
            f"{len(data)} bytes of data are given, {datatype} of shape {list(shape)} has {wanted}", where=where
        )
    if dtype.kind == "b" and wanted and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise InputError("a BOOL tensor holds bytes other than 0 and 1", where=where)
    return np.frombuffer(data, dtype).reshape(shape)


def _split(data: bytes, where: str) -> list[str]:
    """Elements of a BYTES tensor: each a 32-bit little-endian length and so many bytes."""
    elements, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if at + 4 > len(data) or end > len(data):
            raise InputError("the data of a BYTES tensor ends within an element", where=where)
        try:
            elements.append(data[at + 4 : end].decode())
        except UnicodeDecodeError as error:
            raise InputError("a string is not valid UTF-8", where=where) from error
        at = end
    return elements


def bytes_of(array: Array) -> bytes | memoryview:
    """An array as the raw bytes of the protocol; without a copy where it is contiguous."""
    if array.dtype.kind in "OUS":
        parts = [str(element).encode() for element in array.reshape(-1)]
        return b"".join(part for text in parts for part in (len(text).to_bytes(4, "little"), text))
    contiguous = np.ascontiguousarray(array)
    return contiguous.reshape(-1).view(np.uint8).data if array.size else b""
