"""An ONNX model as a checkpoint: its initializers and constants, wherever their bytes lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from onnx_refit.errors import ModelError, WeightsError, WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype, onnx_dtype_name
from onnx_refit.weights.sources.mapped import MappedFile, unreadable
from onnx_refit.weights.sources.sharded import inside

_AGAIN = "The file is no ONNX model or is damaged: export or copy it again"
_PACKED = {"int4", "uint4"}
_MAX_RANK = 64


@dataclass(frozen=True)
class _Stored:
    """One tensor of the model and how to get it."""

    spec: TensorSpec
    read: Callable[[], Array]


class OnnxModelSource:
    """The tensors of one ONNX model.

    Initializers go by their names; the value of a Constant node, and of a ConstantOfShape whose shape is known, by the
    name of the node's output, in sub-graphs too. Text tensors are left out: they are no weights.

    Args:
        model: the path of a model, or one in memory.
        directory: where external data lies; the directory of the path unless given.

    Raises:
        WeightsError: it cannot be opened.
        WeightsFormatError: it is no ONNX model, is damaged, or names external data outside its directory.
    """

    def __init__(self, model: Path | onnx.ModelProto, directory: Path | None = None) -> None:
        if isinstance(model, onnx.ModelProto):
            self._where, self._model = "ModelProto", model
            self._directory = directory
        else:
            self._where, self._model = str(model), _parse(model)
            self._directory = directory or model.parent
        self._files: dict[str, MappedFile] = {}
        self._closed = False
        self._stored: dict[str, _Stored] = {}
        for name, stored in self._find(self._model.graph):
            self._stored.setdefault(name, stored)
        if not self._model.graph.node and not self._stored:
            raise WeightsFormatError("the model has neither nodes nor weights", where=self._where, hint=_AGAIN)
        self._specs = MappingProxyType({name: stored.spec for name, stored in self._stored.items()})

    @property
    def description(self) -> str:
        """The path of the model."""
        return self._where

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec: initializers of the main graph first, then constants in graph order."""
        return self._specs

    def read(self, name: str) -> Array:
        """One tensor, mapped where it lies in an external file.

        Raises:
            WeightsError: there is no such tensor, its file cannot be opened, or the source was closed.
            WeightsFormatError: its bytes do not fit its shape.
        """
        if self._closed:
            raise WeightsError("the checkpoint was closed", where=self._where)
        stored = self._stored.get(name)
        if stored is None:
            raise WeightsError(f"holds no tensor {name!r}", where=self._where)
        array = stored.read()
        if array.shape != stored.spec.shape or array.dtype != numpy_dtype(stored.spec.dtype):
            raise self._damaged(name, f"it holds {array.dtype}{list(array.shape)}, not {stored.spec}")
        return array

    def close(self) -> None:
        """Release the model and its external files; arrays already read stay valid."""
        self._closed = True
        self._model = onnx.ModelProto()
        for file in self._files.values():
            file.close()
        self._files = {}

    def _damaged(self, name: str, reason: object) -> WeightsFormatError:
        return WeightsFormatError(f"tensor {name!r} cannot be read: {reason}", where=self._where, hint=_AGAIN)

    def _find(self, graph: onnx.GraphProto) -> Iterator[tuple[str, _Stored]]:
        shapes: dict[str, onnx.TensorProto] = {}
        for tensor in graph.initializer:
            shapes[tensor.name] = tensor
            yield from self._tensor(tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            yield from self._sparse(sparse.values.name, sparse)
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output:
                constant = _constant(node)
                if isinstance(constant, onnx.TensorProto):
                    shapes[node.output[0]] = constant
                    yield from self._tensor(node.output[0], constant)
                elif isinstance(constant, onnx.SparseTensorProto):
                    yield from self._sparse(node.output[0], constant)
            elif node.op_type == "ConstantOfShape" and len(node.input) == 1 and node.output:
                shape = shapes.get(node.input[0])
                if shape is not None:
                    yield from self._filled(node, shape)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from self._find(attribute.g)
                for graph_ in attribute.graphs:
                    yield from self._find(graph_)

    def _spec(self, name: str, dtype: int, dims: list[int]) -> TensorSpec | None:
        """The spec of a numeric tensor, None for text; WeightsFormatError where the model lies."""
        try:
            dtype_name = onnx_dtype_name(dtype)
        except ModelError as error:
            raise self._damaged(name, error.message) from error
        if len(dims) > _MAX_RANK or any(d < 0 for d in dims) or math.prod(dims) >= 1 << 60:
            raise self._damaged(name, f"{dims[:8]} is no shape")
        return None if dtype_name == "string" else TensorSpec(name, dtype_name, tuple(dims))

    def _tensor(self, name: str, tensor: onnx.TensorProto) -> Iterator[tuple[str, _Stored]]:
        spec = self._spec(name, tensor.data_type, list(tensor.dims))
        if spec is not None:
            yield name, _Stored(spec, lambda: self._read(tensor, spec))

    def _sparse(self, name: str, sparse: onnx.SparseTensorProto) -> Iterator[tuple[str, _Stored]]:
        spec = self._spec(name, sparse.values.data_type, list(sparse.dims))
        if spec is None:
            return

        def read() -> Array:
            values, indices = self._any(sparse.values), self._any(sparse.indices)
            try:
                dense = np.zeros(spec.static_shape, numpy_dtype(spec.dtype))
                if indices.ndim == 2:
                    dense[tuple(indices.T)] = values
                else:
                    dense.reshape(-1)[indices] = values
            except (IndexError, ValueError, MemoryError) as error:
                raise self._damaged(name, error) from error
            return dense

        yield name, _Stored(spec, read)

    def _filled(self, node: onnx.NodeProto, shape: onnx.TensorProto) -> Iterator[tuple[str, _Stored]]:
        name = node.output[0]
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        code = onnx.TensorProto.FLOAT if value is None else value.data_type
        if shape.data_type != onnx.TensorProto.INT64 or math.prod(shape.dims) > _MAX_RANK:
            return
        spec = self._spec(name, code, [int(d) for d in self._any(shape).reshape(-1)])
        if spec is None:
            return

        def read() -> Array:
            element = np.zeros(1, numpy_dtype(spec.dtype)) if value is None else self._any(value).reshape(-1)
            if element.size != 1:
                raise self._damaged(name, f"its value has {element.size} elements")
            # One element seen from everywhere: a model cannot take memory by naming a large shape.
            try:
                return np.broadcast_to(element.reshape(()), spec.static_shape)
            except ValueError as error:
                raise self._damaged(name, error) from error

        yield name, _Stored(spec, read)

    def _any(self, tensor: onnx.TensorProto) -> Array:
        spec = self._spec(tensor.name, tensor.data_type, list(tensor.dims))
        if spec is None:
            raise self._damaged(tensor.name, "text where numbers belong")
        return self._read(tensor, spec)

    def _read(self, tensor: onnx.TensorProto, spec: TensorSpec) -> Array:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return self._external(tensor, spec)
        if tensor.HasField("raw_data") and spec.dtype not in _PACKED:
            raw = tensor.raw_data
            if len(raw) != spec.nbytes:
                raise self._damaged(spec.name, f"{len(raw)} bytes are stored for {spec}")
            return _checked_bool(np.frombuffer(raw, numpy_dtype(spec.dtype)).reshape(spec.static_shape), spec)
        try:
            return _checked_bool(numpy_helper.to_array(tensor), spec)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError, IndexError) as error:
            raise self._damaged(spec.name, error) from error

    def _external(self, tensor: onnx.TensorProto, spec: TensorSpec) -> Array:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if self._directory is None:
            raise WeightsError(
                f"tensor {spec.name!r} lies in the external file {location!r}, and no directory was given",
                where=self._where,
                hint="Give the path of the model instead of the model",
            )
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", spec.nbytes))
        except ValueError as error:
            raise self._damaged(spec.name, error) from error
        if spec.dtype in _PACKED or length != spec.nbytes or offset < 0:
            raise self._damaged(spec.name, f"{length} bytes at {offset} of {location!r} are no {spec}")
        if location not in self._files:
            self._files[location] = MappedFile(inside(self._directory, location, where=self._where))
        return _checked_bool(self._files[location].array(numpy_dtype(spec.dtype), spec.static_shape, offset), spec)


def external_files(path: Path) -> list[str]:
    """The external data files that a model names, for fetching them beside it; errors as for the source."""
    names: dict[str, None] = {}

    def look(graph: onnx.GraphProto) -> None:
        tensors = list(graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                tensors.append(attribute.t)
                for sub_graph in (attribute.g, *attribute.graphs):
                    look(sub_graph)
        for tensor in tensors:
            for entry in tensor.external_data:
                if entry.key == "location":
                    names[entry.value] = None

    look(_parse(path).graph)
    return list(names)


def _checked_bool(array: Array, spec: TensorSpec) -> Array:
    if spec.dtype == "bool" and array.size and int(array.view(np.uint8).max()) > 1:
        raise WeightsFormatError(f"the bool tensor {spec.name!r} holds bytes other than 0 and 1")
    return array


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | onnx.SparseTensorProto | None:
    """The value of a Constant node, None where it is text."""
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                tensor: onnx.TensorProto = attribute.t
                return tensor
            case "sparse_value":
                sparse: onnx.SparseTensorProto = attribute.sparse_tensor
                return sparse
            case "value_float":
                return numpy_helper.from_array(np.array(attribute.f, np.float32))
            case "value_floats":
                return numpy_helper.from_array(np.array(list(attribute.floats), np.float32))
            case "value_int":
                return numpy_helper.from_array(np.array(attribute.i, np.int64))
            case "value_ints":
                return numpy_helper.from_array(np.array(list(attribute.ints), np.int64))
    return None


def _parse(path: Path) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        data = path.read_bytes()
        if not data:
            raise WeightsFormatError("the file is empty", where=path, hint=_AGAIN)
        model.ParseFromString(data)
    except OSError as error:
        raise unreadable(path, error) from error
    except (DecodeError, ValueError, RecursionError) as error:
        raise WeightsFormatError(f"no ONNX model: {error}", where=path, hint=_AGAIN) from error
    if not model.HasField("graph"):
        raise WeightsFormatError("no ONNX model: it has no graph", where=path, hint=_AGAIN)
    return model
