"""Writing safetensors files without a second copy of the tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from onnx_refit.tensors import Array, dtype_name
from onnx_refit.weights.sources.safetensors import safetensors_dtype

_HEADER_ALIGNMENT = 64


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors to an open file, one at a time.

    Larger element types come first, so that every tensor is aligned for its type when the file is mapped; the
    header is padded with spaces to a multiple of 64 bytes. Source: the safetensors format description.

    Raises:
        WeightsError: a dtype that safetensors does not have.
        OSError: what the file raises.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        array = tensors[name]
        end = offset + array.nbytes
        code = safetensors_dtype(dtype_name(array.dtype))
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        array = np.ascontiguousarray(tensors[name])
        if array.size:
            file.write(array.reshape(-1).view(np.uint8).data)
