"""Inference requests and responses over gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx_refit.errors import InputError
from onnx_refit.serve.datatypes import (
    array_from_bytes,
    array_from_list,
    bytes_of,
    checked_shape,
    datatype_of_array,
    dtype_of,
)
from onnx_refit.serve.proto import messages
from onnx_refit.serve.request import InferRequest, InferResponse, WantedOutput, parse_timeout, parse_version
from onnx_refit.tensors import Array

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def parameter_values(parameters: Mapping[str, Any]) -> dict[str, object]:
    """Parameters as plain values."""
    values = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        values[name] = None if kind is None else getattr(parameter, kind)
    return values


def decode_request(message: Any) -> InferRequest:
    """An inference request; raises as ``rest_codec.decode_request``."""
    parameters = parameter_values(message.parameters)
    version = parse_version(message.model_version)
    return InferRequest(
        inputs=_inputs(message),
        outputs=tuple(WantedOutput(output.name) for output in message.outputs) or None,
        id=message.id,
        version=parse_version(parameters.get("version")) if version is None else version,
        timeout=parse_timeout(parameters.get("timeout")),
    )


def _inputs(message: Any) -> dict[str, Array]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InputError(f"{len(message.inputs)} inputs are named, {len(raw)} raw contents are given")
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(message.inputs):
        where = f"input {tensor.name!r}"
        if tensor.name in inputs:
            raise InputError("it is given twice", where=where)
        shape = checked_shape(list(tensor.shape), where)
        if raw:
            if tensor.HasField("contents"):
                raise InputError("it has both contents and raw contents", where=where)
            inputs[tensor.name] = array_from_bytes(raw[index], tensor.datatype, shape, where)
        else:
            inputs[tensor.name] = _from_contents(tensor, shape, where)
    return inputs


def _from_contents(tensor: Any, shape: tuple[int, ...], where: str) -> Array:
    dtype_of(tensor.datatype, where)
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InputError(f"{tensor.datatype} travels as raw contents only", where=where)
    values = list(getattr(tensor.contents, field))
    if field == "bytes_contents":
        try:
            values = [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise InputError("a string is not valid UTF-8", where=where) from error
    return array_from_list(values, tensor.datatype, shape, where)


def encode_response(request: InferRequest, response: InferResponse) -> Any:
    """The message of a response; outputs travel as raw contents."""
    message = messages.ModelInferResponse(model_name=response.model, model_version=str(response.version), id=request.id)
    for name, value in response.parameters.items():
        if isinstance(value, str):
            message.parameters[name].string_param = value
    for name, array in response.outputs.items():
        message.outputs.add(name=name, datatype=datatype_of_array(array), shape=array.shape)
        message.raw_output_contents.append(bytes(bytes_of(array)))
    return message
