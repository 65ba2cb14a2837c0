"""Take the tensors out of a model, so that the compiler moves graphs and never bytes of weights.

``strip`` gives a copy of the model without initializers and without Constant nodes, and the arrays next to it. The
arrays of external data are memory maps; the others are read-only views of the bytes protobuf hands out, so no tensor
is copied more than once, and no protobuf ever holds them all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, numpy_helper

from onnx_refit.errors import ModelError
from onnx_refit.model.graph import Names, value_names
from onnx_refit.tensors import Array, numpy_dtype, onnx_dtype_name

_OPSET = 17  # the default operator set of models that import only others: for the nodes that the compiler adds
_IR = 8  # the oldest IR version written: initializers are constants (4), functions of a model are allowed (8)


@dataclass(frozen=True)
class Stored:
    """One tensor taken out of a model.

    Attributes:
        array: its value; read-only.
        origin: ``"initializer"``, ``"sparse-initializer"`` or ``"constant"``.
    """

    array: Array
    origin: str


def strip(model: ModelProto, base_dir: Path | None = None) -> tuple[ModelProto, dict[str, Stored]]:
    """A copy of the model without tensors, and the tensors by name.

    Value names become unique over all graphs: one that several graphs define keeps its name in the main graph and is
    qualified by the owning node in sub-graphs (``"if_3/then_branch/weight"``). Unnamed nodes get a name. Graph inputs
    that an initializer overrides (IR version 3) are no inputs any more. Function bodies are copied as they are.

    Raises:
        ModelError: external data cannot be found or is cut short, or a tensor type is not supported.
    """
    return _Stripper(model, base_dir).run()


class _Stripper:
    def __init__(self, model: ModelProto, base_dir: Path | None) -> None:
        self.model = model
        self.base_dir = base_dir
        self.tensors: dict[str, Stored] = {}
        self.names = Names({*value_names(model.graph), *_node_names(model.graph)})
        self.repeated = {name for name, count in Counter(_definitions(model.graph)).items() if count > 1}
        self.taken: set[str] = set()

    def run(self) -> tuple[ModelProto, dict[str, Stored]]:
        bare = ModelProto()
        bare.ir_version = max(self.model.ir_version, _IR)
        for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
            setattr(bare, name, getattr(self.model, name))
        versions = {_domain(entry.domain): entry.version for entry in self.model.opset_import}
        for domain, version in {"": _OPSET, **versions}.items():
            bare.opset_import.add(domain=domain, version=version)
        bare.metadata_props.extend(self.model.metadata_props)
        bare.functions.extend(self.model.functions)
        self.graph(self.model.graph, bare.graph, "", {})
        return bare, self.tensors

    def graph(self, old: GraphProto, new: GraphProto, owner: str, outer: dict[str, str]) -> None:
        scope = dict(outer)
        for name in _own_definitions(old):
            scope[name] = self.names.fresh(f"{owner}/{name}") if owner and name in self.repeated else name
        new.name, new.doc_string = old.name, old.doc_string
        for tensor in old.initializer:
            self.tensors[scope[tensor.name]] = Stored(read_tensor(tensor, self.base_dir), "initializer")
        for sparse in old.sparse_initializer:
            name = scope[sparse.values.name]
            self.tensors[name] = Stored(read_sparse(sparse, self.base_dir), "sparse-initializer")
        for node in old.node:
            if node.op_type == "Constant" and node.domain in {"", "ai.onnx"}:
                self.tensors[scope[node.output[0]]] = Stored(read_constant(node, self.base_dir), "constant")
            else:
                self.node(node, new.node.add(), scope)
        for source, target in ((old.input, new.input), (old.output, new.output), (old.value_info, new.value_info)):
            for value in source:
                if source is old.input and scope[value.name] in self.tensors:
                    continue
                copied = target.add()
                copied.CopyFrom(value)
                copied.name = scope.get(value.name, value.name)

    def node(self, old: NodeProto, new: NodeProto, scope: dict[str, str]) -> None:
        new.op_type, new.domain = old.op_type, _domain(old.domain)
        new.doc_string, new.overload = old.doc_string, old.overload
        new.name = self.node_name(old)
        new.input.extend(scope.get(name, name) for name in old.input)
        new.output.extend(scope.get(name, name) for name in old.output)
        for attribute in old.attribute:
            copied = new.attribute.add()
            if attribute.type == AttributeProto.GRAPH:
                copied.name, copied.type = attribute.name, attribute.type
                self.graph(attribute.g, copied.g, f"{new.name}/{attribute.name}", scope)
            elif attribute.type == AttributeProto.GRAPHS:
                copied.name, copied.type = attribute.name, attribute.type
                for index, inner in enumerate(attribute.graphs):
                    self.graph(inner, copied.graphs.add(), f"{new.name}/{attribute.name}_{index}", scope)
            else:
                copied.CopyFrom(attribute)

    def node_name(self, node: NodeProto) -> str:
        if node.name and node.name not in self.taken:
            self.taken.add(node.name)
            return node.name
        name = self.names.fresh(node.name or f"{node.op_type}_{next((o for o in node.output if o), 'none')}")
        self.taken.add(name)
        return name


def _domain(name: str) -> str:
    """The default domain has two spellings; the compiler writes the empty one."""
    return "" if name == "ai.onnx" else name


def _node_names(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.name
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _node_names(inner)


def _own_definitions(graph: GraphProto) -> list[str]:
    """The value names that a graph defines, each once (an input with an initializer is one value)."""
    names = [value.name for value in graph.input]
    names += [tensor.name for tensor in graph.initializer]
    names += [sparse.values.name for sparse in graph.sparse_initializer]
    names += [output for node in graph.node for output in node.output if output]
    return list(dict.fromkeys(names))


def _definitions(graph: GraphProto) -> Iterator[str]:
    yield from _own_definitions(graph)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _definitions(inner)


def read_tensor(tensor: TensorProto, base_dir: Path | None = None) -> Array:
    """A tensor's value: a memory map where it is external data, else a view of its bytes where it has raw data.

    Raises:
        ModelError: the external file is missing or cut short, leaves the model's folder, or ``base_dir`` is not given.
    """
    if tensor.data_location == TensorProto.EXTERNAL:
        return _read_external(tensor, base_dir)
    if tensor.data_type == TensorProto.STRING:
        texts = [text.decode("utf-8") for text in tensor.string_data]
        return np.array(texts, dtype=object).reshape(tuple(tensor.dims))
    array: Array = numpy_helper.to_array(tensor)
    onnx_dtype_name(tensor.data_type)
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def _read_external(tensor: TensorProto, base_dir: Path | None) -> Array:
    if base_dir is None:
        raise ModelError(
            "the tensor is stored outside the model, and the folder of its file is not known",
            where=tensor.name,
            hint="Pass the folder of the model file as base_dir",
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(entries.get("location", ""))
    path = base_dir / location
    if location.is_absolute() or ".." in location.parts:
        raise ModelError(f"external data {str(location)!r} is outside the model's folder", where=tensor.name)
    if not path.is_file():
        raise ModelError(f"external data {str(location)!r} is missing", where=tensor.name)
    kind = onnx_dtype_name(tensor.data_type)
    shape = tuple(int(d) for d in tensor.dims)
    offset = int(entries.get("offset", 0))
    packed = kind in {"int4", "uint4"}
    dtype = np.dtype(np.uint8) if packed else numpy_dtype(kind)
    count = math.prod(shape)
    need = (count + 1) // 2 if packed else count * dtype.itemsize
    if offset + need > path.stat().st_size:
        raise ModelError(f"external data {str(location)!r} is cut short", where=tensor.name)
    if count == 0:
        return np.zeros(shape, dtype)
    raw = np.memmap(path, np.uint8, "r", offset, (need,))
    if packed:
        inline = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())
        return numpy_helper.to_array(inline)
    if offset % dtype.itemsize:
        return np.frombuffer(raw.tobytes(), dtype).reshape(shape)
    return raw.view(np.ndarray).view(dtype).reshape(shape)


def read_sparse(sparse: SparseTensorProto, base_dir: Path | None = None) -> Array:
    """A sparse tensor as a dense array (indices linear ``[n]`` or coordinates ``[n, rank]``, IR specification)."""
    values = read_tensor(sparse.values, base_dir)
    indices = read_tensor(sparse.indices, base_dir).astype(np.int64)
    shape = tuple(int(d) for d in sparse.dims)
    dense = np.zeros(math.prod(shape), values.dtype)
    linear = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
    dense[linear] = values
    return dense.reshape(shape)


def read_constant(node: NodeProto, base_dir: Path | None = None) -> Array:
    """The value of a Constant node in any of its forms (Constant-1 to the latest: ``value_string(s)`` included).

    Raises:
        ModelError: the node has none of the value attributes.
    """
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        match attribute.name:
            case "value":
                return read_tensor(value, base_dir)
            case "sparse_value":
                return read_sparse(value, base_dir)
            case "value_float" | "value_floats":
                return np.array(value, np.float32)
            case "value_int" | "value_ints":
                return np.array(value, np.int64)
            case "value_string":
                return np.array(value.decode("utf-8"), object)
            case "value_strings":
                return np.array([text.decode("utf-8") for text in value], object)
    raise ModelError("the Constant node has no value", where=node.name or node.output[0])
