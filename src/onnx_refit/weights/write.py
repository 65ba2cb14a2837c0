"""Writing tensors as safetensors, streamed one at a time and atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from onnx_refit.files import atomic_write
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.safetensors import safetensors_dtype


def write_safetensors(
    path: str | os.PathLike[str],
    source: WeightSource,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write all tensors of a source; only one is in memory at a time.

    Raises:
        WriteError: the file cannot be written; what stood there still stands.
        WeightsError: a tensor cannot be read, or its dtype has no place in the format.
    """
    with atomic_write(path) as file:
        stream(file, source.specs, source.read, metadata, progress)


def stream(
    file: BinaryIO,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Array],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write header and tensors to an open file; widest elements first, so that all of them are aligned."""
    order = sorted(specs, key=lambda name: -(specs[name].nbytes // max(1, specs[name].size)) if specs[name].size else 0)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        spec = specs[name]
        header[name] = {
            "dtype": safetensors_dtype(spec.dtype),
            "shape": list(spec.static_shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    done = 0
    for name in order:
        array = np.ascontiguousarray(read(name))
        if array.size:
            file.write(array.reshape(-1).view(np.uint8).data)
        done += array.nbytes
        if progress is not None:
            progress(done)
