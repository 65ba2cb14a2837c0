"""Models and their weights on disk: how graphs larger than protobuf's 2 GiB go to an optimiser and come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from onnx_refit.model.graph import all_graphs
from onnx_refit.plan.trace.canonical import TensorKey, rename_by_use
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype, onnx_dtype, onnx_dtype_name

WEIGHTS_FILE = "weights.bin"
_INLINE = 256  # bytes; optimisers look at the values of small tensors
_PAGE = 4096
_CHUNK = 1 << 20  # elements written at once

Values = Callable[[TensorSpec, int, int], Array]
"""(weight, first element, count) -> values, flat."""


@dataclass(frozen=True)
class Optimised:
    """What an optimiser made of a model.

    Attributes:
        model: the graph, values named by order of use; its initializers hold no data.
        tensors: the data of every initializer; those in files are views of the files.
        weights: the values that each weight had, flat; views of a file.
    """

    model: onnx.ModelProto
    tensors: Mapping[TensorKey, Array]
    weights: Mapping[str, Array]


Optimise = Callable[[Path, Path, Sequence[str]], None]
"""(model file, file to write, names of optimisations to leave out): writes the optimised model, with or without
external data beside it."""


def with_initializers(model: onnx.ModelProto, weights: Sequence[TensorSpec]) -> onnx.ModelProto:
    """The model with these of its graph inputs declared as initializers, data to follow.

    A weight that only sub-graphs read is declared there, in each: optimisers look no further than their own graph.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    names = {spec.name for spec in weights}
    kept = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(kept)
    graphs = list(all_graphs(graph))
    users: dict[str, set[int]] = {}
    for number, inner in enumerate(graphs):
        for node in inner.node:
            for name in node.input:
                users.setdefault(name, set()).add(number)
        for value in inner.output:
            users.setdefault(value.name, set()).add(number)
    for spec in weights:
        where = users.get(spec.name, set())
        for number in [0] if not where or 0 in where else sorted(where):
            if number and any(spec.name in {*node.output, *_bound(graphs[number])} for node in graphs[number].node):
                number = 0
            tensor = graphs[number].initializer.add(name=spec.name, data_type=onnx_dtype(spec.dtype))
            tensor.dims.extend(spec.static_shape)
    return changed


def _bound(graph: onnx.GraphProto) -> set[str]:
    return {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}


def write(model: onnx.ModelProto, weights: Sequence[TensorSpec], values: Values, folder: Path) -> Path:
    """Write the model and its weights to a folder; ``model`` comes from ``with_initializers``."""
    layout = _layout(weights)
    small: dict[str, bytes] = {}
    with (folder / WEIGHTS_FILE).open("wb") as data:
        for spec in weights:
            data.seek(layout[spec.name])
            for first in range(0, spec.size, _CHUNK):
                chunk = values(spec, first, min(_CHUNK, spec.size - first)).view(np.uint8).data
                data.write(chunk)
                if spec.nbytes < _INLINE:
                    small[spec.name] = bytes(chunk)
        data.truncate(max(1, data.tell()))
    file = onnx.ModelProto()
    file.CopyFrom(model)
    specs = {spec.name: spec for spec in weights}
    for graph in all_graphs(file.graph):
        for tensor in graph.initializer:
            owner = specs.get(tensor.name)
            if owner is None:
                continue
            if tensor.name in small:
                tensor.raw_data = small[tensor.name]
                continue
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", WEIGHTS_FILE),
                ("offset", str(layout[owner.name])),
                ("length", str(owner.nbytes)),
            ):
                tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(file.SerializeToString())
    return path


def _layout(weights: Sequence[TensorSpec]) -> dict[str, int]:
    offsets, end = {}, 0
    for spec in weights:
        offsets[spec.name] = end
        end += -(-spec.nbytes // _PAGE) * _PAGE
    return offsets


def run(
    optimise: Optimise,
    model: onnx.ModelProto,
    weights: Sequence[TensorSpec],
    values: Values,
    disabled: Sequence[str],
    folder: Path,
) -> Optimised:
    """Optimise the model with these values as its weights; the result reads the folder's files when asked."""
    folder.mkdir()
    target = folder / "optimised.onnx"
    optimise(write(model, weights, values, folder), target, disabled)
    result = onnx.load(str(target), load_external_data=False)
    rename_by_use(result)
    files = _Files()
    tensors: dict[TensorKey, Array] = {}
    for number, graph in enumerate(all_graphs(result.graph)):
        for tensor in graph.initializer:
            tensors[number, tensor.name] = _data(tensor, folder, files)
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(field)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
    layout = _layout(weights)
    flat = {
        spec.name: files.view(folder / WEIGHTS_FILE, layout[spec.name], numpy_dtype(spec.dtype), (spec.size,))
        for spec in weights
    }
    return Optimised(result, tensors, flat)


class _Files:
    """Views of tensors in files, mapped: nothing is read before it is looked at, and nothing is kept."""

    def __init__(self) -> None:
        self._maps: dict[Path, Array] = {}

    def view(self, path: Path, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, "r").view(np.ndarray)
        size = math.prod(shape) * dtype.itemsize
        return self._maps[path][offset : offset + size].view(dtype).reshape(shape)


def _data(tensor: TensorProto, folder: Path, files: _Files) -> Array:
    if tensor.data_location != TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    entry = {item.key: item.value for item in tensor.external_data}
    dtype = numpy_dtype(onnx_dtype_name(tensor.data_type))
    return files.view(folder / entry["location"], int(entry.get("offset", 0)), dtype, tuple(tensor.dims))
