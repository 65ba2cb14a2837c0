"""Weights packed for a transport: a table and raw bytes, so that no transport needs to know a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array, dtype_name, numpy_dtype

Parcel: TypeAlias = "dict[str, tuple[str, tuple[int, ...], Array]]"
"""Name -> dtype name, shape, and the bytes (uint8, one dimension)."""


def pack(arrays: Mapping[str, Array]) -> Parcel:
    """Arrays as a parcel; contiguous ones are not copied.

    Args:
        arrays: name -> array of numbers.
    """
    parcel: Parcel = {}
    for name, array in arrays.items():
        # A view of bytes needs at least one dimension and a last axis without gaps.
        flat = np.ascontiguousarray(array).reshape(-1)
        parcel[name] = (dtype_name(array.dtype), tuple(array.shape), flat.view(np.uint8))
    return parcel


def unpack(parcel: Parcel) -> dict[str, Array]:
    """The arrays of a parcel, sharing its memory; WeightsError for what ``pack`` did not make."""
    arrays = {}
    for name, (dtype, shape, data) in parcel.items():
        try:
            arrays[name] = data.view(numpy_dtype(dtype)).reshape(shape)
        except (KeyError, ValueError, TypeError) as error:
            raise WeightsError(f"the parcel is damaged: {error}", where=name) from error
    return arrays
