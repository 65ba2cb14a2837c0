"""Inference requests and responses over REST: JSON, and the binary tensor extension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from onnx_refit.errors import InputError
from onnx_refit.serve.datatypes import (
    array_from_bytes,
    array_from_list,
    bytes_of,
    checked_shape,
    datatype_of_array,
    dtype_of,
)
from onnx_refit.serve.request import InferRequest, InferResponse, WantedOutput, parse_timeout, parse_version
from onnx_refit.tensors import Array

HEADER_LENGTH = "inference-header-content-length"
_MAX_NAME = 1024


def parse_json(body: bytes | memoryview) -> dict[str, Any]:
    """A JSON object; InputError for anything else."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError("the body is no JSON object")
    return data


def decode_request(body: bytes, header_length: str | None) -> InferRequest:
    """An inference request.

    Args:
        body: the whole body.
        header_length: value of the header Inference-Header-Content-Length, where it was sent.

    Raises:
        InputError: the body breaks the protocol.
        VersionError: it asks for what is no version.
    """
    view = memoryview(body)
    size = len(view)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
            raise InputError("the header Inference-Header-Content-Length is no number")
        size = int(header_length)
        if size > len(view):
            raise InputError("the header Inference-Header-Content-Length is larger than the body")
    data = parse_json(view[:size])
    parameters = _parameters(data, "the request")
    identifier = data.get("id", "")
    if not isinstance(identifier, str):
        raise InputError("the id must be a string")
    return InferRequest(
        inputs=_inputs(data.get("inputs"), view[size:]),
        outputs=_outputs(data.get("outputs")),
        id=identifier,
        version=parse_version(parameters.get("version")),
        timeout=parse_timeout(parameters.get("timeout")),
        binary=_flag(parameters, "binary_data_output", "the request") or False,
    )


def _parameters(entry: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InputError("the parameters must be an object", where=where)
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"the parameter {name!r} must be true or false", where=where)
    return value


def _name(entry: object, what: str) -> tuple[dict[str, Any], str]:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise InputError(f"every {what} must be an object with a name")
    return entry, name


def _inputs(entries: object, tail: memoryview) -> dict[str, Array]:
    if not isinstance(entries, list):
        raise InputError("the request has no list of inputs")
    inputs: dict[str, Array] = {}
    at = 0
    for element in entries:
        entry, name = _name(element, "input")
        where = f"input {name!r}"
        if name in inputs:
            raise InputError("it is given twice", where=where)
        shape = checked_shape(entry.get("shape"), where)
        datatype = entry.get("datatype")
        size = _parameters(entry, where).get("binary_data_size")
        if size is None:
            if "data" not in entry:
                raise InputError("it has no data", where=where)
            inputs[name] = array_from_list(entry["data"], datatype, shape, where)
            continue
        if type(size) is not int or not 0 <= size <= len(tail) - at:
            raise InputError(f"its binary_data_size is {size!r}, {len(tail) - at} bytes are left", where=where)
        if "data" in entry:
            raise InputError("it has both data and binary_data_size", where=where)
        inputs[name] = array_from_bytes(_aligned(tail[at : at + size], datatype, where), datatype, shape, where)
        at += size
    if at != len(tail):
        raise InputError(f"{len(tail) - at} bytes follow the last input")
    return inputs


def _aligned(data: memoryview, datatype: object, where: str) -> memoryview | bytes:
    """The data, copied only if its elements do not lie on their boundaries, as the engine needs them to."""
    itemsize = dtype_of(datatype, where).itemsize
    address = np.frombuffer(data, np.uint8).__array_interface__["data"][0] if len(data) else 0
    return bytes(data) if address % itemsize else data


def _outputs(entries: object) -> tuple[WantedOutput, ...] | None:
    if entries is None or entries == []:
        return None
    if not isinstance(entries, list):
        raise InputError("the outputs must be a list")
    wanted = []
    for element in entries:
        entry, name = _name(element, "output")
        where = f"output {name!r}"
        parameters = _parameters(entry, where)
        if "classification" in parameters:
            raise InputError("the classification extension is not supported", where=where)
        wanted.append(WantedOutput(name, _flag(parameters, "binary_data", where)))
    if len({output.name for output in wanted}) != len(wanted):
        raise InputError("an output is asked for twice")
    return tuple(wanted)


def encode_response(request: InferRequest, response: InferResponse) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON part where raw bytes follow it."""
    chosen = {output.name: output.binary for output in request.outputs or ()}
    described: list[dict[str, Any]] = []
    blobs: list[bytes | memoryview] = []
    for name, array in response.outputs.items():
        binary = chosen.get(name)
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of_array(array), "shape": array.shape}
        if request.binary if binary is None else binary:
            data = bytes_of(array)
            entry["parameters"] = {"binary_data_size": len(data)}
            blobs.append(data)
        else:
            entry["data"] = _plain(array)
        described.append(entry)
    head: dict[str, Any] = {
        "model_name": response.model,
        "model_version": str(response.version),
        "outputs": described,
    }
    if request.id:
        head["id"] = request.id
    if response.parameters:
        head["parameters"] = response.parameters
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([text, *blobs]), len(text)) if blobs else (text, None)


def _plain(array: Array) -> Any:
    """The elements, row by row, in a form that orjson writes."""
    if array.dtype.kind in "OUS":
        return [str(element) for element in array.reshape(-1).tolist()]
    if array.dtype.kind not in "iufb":
        return array.reshape(-1).astype(np.float32)
    return np.ascontiguousarray(array).reshape(-1)
