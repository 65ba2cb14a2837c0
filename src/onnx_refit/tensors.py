"""Names, dtypes and shapes of tensors: the one vocabulary all floors share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from onnx_refit.errors import ModelError

Array = npt.NDArray[Any]
"""A tensor on the host; strings are object arrays of ``str``."""

# ONNX tensor types (IR specification, TensorProto.DataType) by the lower-case names used everywhere in this project.
_BY_NAME: dict[str, tuple[int, np.dtype[np.generic]]] = {
    "float32": (onnx.TensorProto.FLOAT, np.dtype(np.float32)),
    "uint8": (onnx.TensorProto.UINT8, np.dtype(np.uint8)),
    "int8": (onnx.TensorProto.INT8, np.dtype(np.int8)),
    "uint16": (onnx.TensorProto.UINT16, np.dtype(np.uint16)),
    "int16": (onnx.TensorProto.INT16, np.dtype(np.int16)),
    "int32": (onnx.TensorProto.INT32, np.dtype(np.int32)),
    "int64": (onnx.TensorProto.INT64, np.dtype(np.int64)),
    "string": (onnx.TensorProto.STRING, np.dtype(object)),
    "bool": (onnx.TensorProto.BOOL, np.dtype(np.bool_)),
    "float16": (onnx.TensorProto.FLOAT16, np.dtype(np.float16)),
    "float64": (onnx.TensorProto.DOUBLE, np.dtype(np.float64)),
    "uint32": (onnx.TensorProto.UINT32, np.dtype(np.uint32)),
    "uint64": (onnx.TensorProto.UINT64, np.dtype(np.uint64)),
    "complex64": (onnx.TensorProto.COMPLEX64, np.dtype(np.complex64)),
    "complex128": (onnx.TensorProto.COMPLEX128, np.dtype(np.complex128)),
    "bfloat16": (onnx.TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "float8e4m3fn": (onnx.TensorProto.FLOAT8E4M3FN, np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8e5m2": (onnx.TensorProto.FLOAT8E5M2, np.dtype(ml_dtypes.float8_e5m2)),
    "int4": (onnx.TensorProto.INT4, np.dtype(ml_dtypes.int4)),
    "uint4": (onnx.TensorProto.UINT4, np.dtype(ml_dtypes.uint4)),
}
_BY_ONNX = {code: name for name, (code, _) in _BY_NAME.items()}
_BY_NUMPY = {dtype: name for name, (_, dtype) in _BY_NAME.items()}


def dtype_name(dtype: object) -> str:
    """The project's name of a NumPy dtype (``np.float32`` -> ``"float32"``); ModelError for one ONNX lacks."""
    resolved = np.dtype(dtype)  # type: ignore[call-overload]
    if resolved.kind in "US":
        return "string"
    name = _BY_NUMPY.get(resolved)
    if name is None:
        raise ModelError(f"dtype {resolved} has no ONNX tensor type")
    return name


def onnx_dtype_name(code: int) -> str:
    """The project's name of an ONNX ``TensorProto.DataType`` code; ModelError for one this project lacks."""
    name = _BY_ONNX.get(code)
    if name is None:
        raise ModelError(f"ONNX tensor type {code} is not supported")
    return name


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype of a project dtype name."""
    return _BY_NAME[name][1]


def onnx_dtype(name: str) -> int:
    """The ONNX ``TensorProto.DataType`` code of a project dtype name."""
    return _BY_NAME[name][0]


def is_extension(dtype: np.dtype[np.generic]) -> bool:
    """Whether NumPy has the dtype from ml_dtypes only (not all of those are of kind "V": float8e5m2 is of kind "f")."""
    return dtype.isbuiltin == 2


def is_floating(name: str) -> bool:
    """Whether the dtype holds real numbers in a floating-point format."""
    return name.startswith(("float", "bfloat"))


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor.

    ``shape`` holds an int for a fixed dimension, a str for a named dynamic one, None for an unnamed dynamic one;
    the whole shape is None where even the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    # Cached: a refit asks these of every tensor, several times.
    @cached_property
    def is_static(self) -> bool:
        """Whether every dimension is a number."""
        return self.shape is not None and all(isinstance(d, int) for d in self.shape)

    @cached_property
    def static_shape(self) -> tuple[int, ...]:
        """The shape as plain ints; ModelError unless it is static."""
        if self.shape is None or not self.is_static:
            raise ModelError("the shape is not static", where=self.name)
        return tuple(d for d in self.shape if isinstance(d, int))

    @cached_property
    def size(self) -> int:
        """Number of elements; ModelError unless the shape is static."""
        return math.prod(self.static_shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole tensor; ModelError unless the shape is static."""
        return self.size * numpy_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


def spec_of(name: str, array: Array) -> TensorSpec:
    """The spec of an array under a name."""
    return TensorSpec(name, dtype_name(array.dtype), tuple(int(d) for d in array.shape))


def spec_of_value_info(info: onnx.ValueInfoProto) -> TensorSpec:
    """The spec of a graph input or output; ModelError for sequences, maps and optionals."""
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        raise ModelError(f"a value of kind {kind or 'unknown'} is not a tensor", where=info.name)
    tensor = info.type.tensor_type
    shape: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(int(d.dim_value) if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)
    return TensorSpec(info.name, onnx_dtype_name(tensor.elem_type), shape)


def value_info_of(spec: TensorSpec) -> onnx.ValueInfoProto:
    """The graph input or output declaration of a spec."""
    return onnx.helper.make_tensor_value_info(spec.name, onnx_dtype(spec.dtype), spec.shape)
