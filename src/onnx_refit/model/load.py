"""Reading ONNX files, with an error in words for everything that can be wrong with one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor

from onnx_refit.errors import ModelError, UnsupportedModelError
from onnx_refit.model.detach import read_detached
from onnx_refit.model.graph import all_graphs, opset, without_initializers
from onnx_refit.model.order import sort_nodes

_STANDARD = ("", "ai.onnx")
_MODEL = "Give an ONNX model (.onnx)"
_MAX_PROTOBUF = 2**31 - 1
_SMALL = 256
"""Elements of a tensor that is read from external data in any case, as passes and shape inference may need it."""
_WIDTHS: dict[int, int] = {
    code: onnx.helper.tensor_dtype_to_np_dtype(code).itemsize
    for code in (
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.DOUBLE,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT32,
        TensorProto.INT64,
    )
}
"""Bytes of an element, of the types that large tensors are made of."""


def load_model(
    source: str | os.PathLike[str] | ModelProto, *, load_external_data: bool = True, check: bool = True
) -> ModelProto:
    """Read and check an ONNX model.

    Args:
        source: a file, or a model already in memory (checked and returned as it is).
        load_external_data: read weights that lie in files of their own. Where the whole model would be larger than
            the 2 GB a protobuf can be, they stay where they are in any case (``data_location`` says so); that they
            are there is checked. Small ones (shapes, axes, scalars) are read in any case. Without it the large
            tensors inside of the model file stay there too, marked in the same way.
        check: run the ONNX checker too. Nodes may be in any order; ``prepare`` sorts them.

    Raises:
        ModelError: no such file, empty, not ONNX, damaged, external data missing or outside of the model's folder.
        UnsupportedModelError: valid ONNX, but with an opset or operator that this installation does not know.
    """
    if isinstance(source, ModelProto):
        check_structure(source, None)
        check_operators(source, None)
        if check:
            check_model(source, any_order=True)
        return source
    path = Path(source)
    if load_external_data:
        model, size = _parsed(_read(path), path)
    else:
        _require_file(path)
        model, size = read_detached(path), 0
    check_structure(model, path)
    check_operators(model, path)
    size += _check_external(model, path)
    if check:
        check_model(model, path, any_order=True)
    everything = load_external_data and size <= _MAX_PROTOBUF
    for tensor in external_tensors(model):
        if everything or math.prod(tensor.dims) <= _SMALL:
            _read_external(tensor, path)
    return model


def _read_external(tensor: TensorProto, path: Path) -> None:
    try:
        load_external_data_for_tensor(tensor, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"the external data of {tensor.name} cannot be read: {error}", where=path) from error
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _parsed(data: bytes, path: Path) -> tuple[ModelProto, int]:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError("not an ONNX model, or a damaged one", where=path, hint=_MODEL) from error
    return model, len(data)


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise ModelError("a directory, not a model file", where=path, hint="Name the .onnx file in it")
    if not path.exists():
        raise ModelError("no such file", where=path, hint="Check the path")


def _read(path: Path) -> bytes:
    _require_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=path) from error
    if not data:
        raise ModelError("the file is empty", where=path, hint="Export the model again")
    return data


def check_structure(model: ModelProto, path: Path | None) -> None:
    """ModelError unless a parsed protobuf is recognisably an ONNX model (protobuf reads much that is none)."""
    missing = None
    if not model.HasField("graph"):
        missing = "graph"
    elif not model.ir_version:
        missing = "IR version"
    elif not model.opset_import:
        missing = "opset"
    if missing is not None:
        raise ModelError(f"not an ONNX model: it has no {missing}", where=path, hint=_MODEL)
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedModelError(
            f"ONNX IR version {model.ir_version} is newer than {onnx.IR_VERSION}, the newest this installation reads",
            where=path,
            hint="Upgrade the packages onnx and onnxruntime, or export the model in an older version",
        )
    if not model.graph.output:
        raise ModelError("the graph has no output", where=path)
    for text in _texts(model):
        if not isinstance(text, str):  # protobuf gives bytes where a name is not UTF-8
            raise ModelError(f"damaged: the name {text!r} is not UTF-8", where=path)


def _texts(model: ModelProto) -> Iterator[object]:
    """All names in a model."""
    for entry in model.opset_import:
        yield entry.domain
    for graph in all_graphs(model.graph):
        yield graph.name
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            yield value.name
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)


def check_operators(model: ModelProto, path: Path | None) -> None:
    """UnsupportedModelError for an opset or an operator that neither ONNX nor ONNX Runtime knows."""
    newest = onnx.defs.onnx_opset_version()
    version = opset(model)
    if version is not None and version > newest:
        raise UnsupportedModelError(
            f"opset {version} is newer than {newest}, the newest this installation knows",
            where=path,
            hint="Upgrade the packages onnx and onnxruntime, or export the model for an older opset",
        )
    versions = {entry.domain: int(entry.version) for entry in model.opset_import}
    functions = {(function.domain, function.name) for function in model.functions}
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if (node.domain, node.op_type) not in functions:
                _check_operator(node, versions, path)


def _check_operator(node: onnx.NodeProto, versions: dict[str, int], path: Path | None) -> None:
    domain = "" if node.domain in _STANDARD else node.domain
    version = versions.get(node.domain)
    if version is None and domain == "":
        version = next((versions[name] for name in _STANDARD if name in versions), None)
    title = f"{domain}.{node.op_type}" if domain else node.op_type
    where = f"{path}: node {node.name}" if path and node.name else path or node.name or None
    if version is None:
        raise ModelError(f"the operator {title} is used but its domain has no opset", where=where)
    if not onnx.defs.has(node.op_type, domain):
        if (domain, node.op_type) in _runtime_operators():
            return
        raise UnsupportedModelError(f"the operator {title} is not known to ONNX or ONNX Runtime", where=where)
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError as error:
        raise UnsupportedModelError(f"opset {version} has no operator {title}", where=where) from error
    if schema.deprecated:
        raise UnsupportedModelError(f"the operator {title} was withdrawn before opset {version}", where=where)


@cache
def _runtime_operators() -> frozenset[tuple[str, str]]:
    """Operators that ONNX Runtime adds to ONNX's own, as (domain, operator)."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return frozenset((schema.domain, schema.name) for schema in state.get_all_operator_schema())


def check_model(model: ModelProto, path: Path | None = None, *, any_order: bool = False) -> None:
    """ModelError with the checker's words unless the ONNX checker accepts the model (its nodes sorted, if so asked)."""
    bare = _bare(model)
    if any_order:
        sort_nodes(bare, path)
    try:
        onnx.checker.check_model(bare)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        first = " ".join(str(error).strip().split("\n\n")[0].split())
        raise ModelError(f"not valid ONNX: {first}", where=path) from error


def _bare(model: ModelProto) -> ModelProto:
    """The model for the checker: no bytes of weights, external data beside it, an unknown shape some shape.

    The checker takes the model's serialised form, looks external data up, and wants every output to have a shape,
    which ONNX Runtime does not. Of the bytes of a tensor it only asks that there are enough.
    """
    bare = without_initializers(model)
    for tensor in model.graph.initializer:
        if _is_whole(tensor):
            bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=[0])
        else:
            bare.graph.initializer.append(tensor)
    for value in bare.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    for tensor in _tensors(bare):
        if tensor.data_location == TensorProto.EXTERNAL:
            name, kind = tensor.name, tensor.data_type
            tensor.Clear()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.append(0)
    return bare


def _is_whole(tensor: TensorProto) -> bool:
    """Whether a tensor is large, and its bytes are raw and as many as its dtype and shape take."""
    count = math.prod(tensor.dims)
    if count <= _SMALL or min(tensor.dims) < 0 or not tensor.HasField("raw_data") or tensor.data_type not in _WIDTHS:
        return False
    others = {field.name for field, _ in tensor.ListFields()} - {"name", "data_type", "dims", "raw_data", "doc_string"}
    return not others and len(tensor.raw_data) == count * _WIDTHS[tensor.data_type]


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """All initializers, and the tensors of all Constant nodes."""
    for graph in all_graphs(model.graph):
        yield from graph.initializer
        for node in graph.node:
            yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def external_tensors(model: ModelProto) -> list[TensorProto]:
    """The initializers whose values lie in files of their own."""
    return [
        tensor
        for graph in all_graphs(model.graph)
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    ]


def _check_external(model: ModelProto, path: Path) -> int:
    """Bytes of the external data; ModelError where a file is missing, too short or outside of the model's folder."""
    total = 0
    for tensor in external_tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        inside = PurePosixPath(location.replace("\\", "/"))
        if not location or inside.is_absolute() or ".." in inside.parts or PureWindowsPath(location).drive:
            raise ModelError(
                f"the external data {location!r} of {tensor.name} is not in the model's folder", where=path
            )
        file = path.parent / location
        try:
            size = file.stat().st_size
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        except FileNotFoundError as error:
            raise ModelError(
                f"the external data of {tensor.name} is missing: {file}",
                where=path,
                hint="Keep the model and its data files in one folder",
            ) from error
        except ValueError as error:
            raise ModelError(
                f"offset or length of the external data of {tensor.name} is no number", where=path
            ) from error
        except OSError as error:
            raise ModelError(
                f"the external data of {tensor.name} cannot be read: {error.strerror}", where=file
            ) from error
        if offset + length > size:
            needs = f"{tensor.name} needs {offset + length} bytes, the file has {size}"
            raise ModelError(f"the external data file is cut short: {needs}", where=file)
        total += length or size - offset
    return total
