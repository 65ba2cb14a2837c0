"""The OpenAPI description of the HTTP interface, for clients and for tests that generate requests from it."""

from __future__ import annotations

from functools import cache
from typing import Any

from onnx_refit._version import __version__

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_INTEGER: Schema = {"type": "integer"}
_BOOLEAN: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_DATATYPES = [
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
]

_TENSOR: Schema = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 1024},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 32},
        "datatype": {"type": "string", "enum": _DATATYPES},
        "parameters": _OBJECT,
        "data": {"type": "array"},
    },
}
_OUTPUT: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 1024}, "parameters": _OBJECT},
}
_INFER: Schema = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": _STRING,
        "parameters": _OBJECT,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": _OUTPUT},
    },
}
_CANARY: Schema = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "inputs": {"type": "array", "items": _TENSOR},
        "expect": {"type": "array", "items": _TENSOR},
        "rtol": {"type": "number", "minimum": 0},
        "atol": {"type": "number", "minimum": 0},
    },
}


def _path(name: str, schema: Schema | None = None) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema or _STRING}


def _query(name: str, schema: Schema, *, required: bool = False) -> Schema:
    return {"name": name, "in": "query", "required": required, "schema": schema}


_MODEL = _path("model")
_VERSION = _path("version", {"type": "integer", "minimum": 1})
_ID = _path("id")


def _answer(text: str, kind: str = "application/json") -> Schema:
    return {"description": text, "content": {kind: {}}}


def _operation(
    summary: str,
    *parameters: Schema,
    body: Schema | None = None,
    kind: str = "application/json",
    success: tuple[int, ...] = (200,),
    failures: tuple[int, ...] = (),
    answer: str = "application/json",
    admin: bool = False,
    needs_body: bool = True,
) -> Schema:
    operation: Schema = {"summary": summary, "parameters": list(parameters), "responses": {}}
    for code in success:
        operation["responses"][str(code)] = _answer("as asked", answer)
    for code in (400, 401, 403, 404, 405, 408, 410, 413, 415, 429, 431, 503, 504, *failures):
        operation["responses"][str(code)] = _answer("refused, with an object that says why in 'error'")
    if body is not None:
        operation["requestBody"] = {"required": needs_body, "content": {kind: {"schema": body}}}
    if admin:
        operation["security"] = [{"token": []}]
    return operation


_BINARY: Schema = {"type": "string", "format": "binary"}


def _infer(summary: str, *parameters: Schema) -> Schema:
    return {"post": _operation(summary, *parameters, body=_INFER)}


def _protocol() -> dict[str, Schema]:
    base = "/v2/models/{model}"
    at_version = base + "/versions/{version}"
    described = {
        "/v2": {"get": _operation("Server metadata")},
        "/v2/health/live": {"get": _operation("Whether the server runs")},
        "/v2/health/ready": {"get": _operation("Whether the server takes requests")},
        "/v2/models": {"get": _operation("The models' names")},
        "/v2/repository/index": {"post": _operation("The models and their states", body=_OBJECT, needs_body=False)},
        base + "/infer": _infer("Run an inference with the current version, or as the traffic split says", _MODEL),
        at_version + "/infer": _infer("Run an inference with a version", _MODEL, _VERSION),
    }
    for suffix, summary in (("", "Metadata"), ("/ready", "Whether it takes requests"), ("/config", "Configuration")):
        described[base + suffix] = {"get": _operation(summary, _MODEL)}
        described[at_version + suffix] = {"get": _operation(summary, _MODEL, _VERSION)}
    for verb, summary in (("load", "Take a model online"), ("unload", "Take a model offline; its weights stay")):
        described[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": _operation(summary, _MODEL, admin=True, body=_OBJECT, needs_body=False)
        }
    return described


def _refit() -> dict[str, Schema]:
    base = "/v2/models/{model}/refit"
    flags = [_query(name, _BOOLEAN) for name in ("partial", "allow_nonfinite", "allow_rounding", "measure")]
    rollback = {"type": "object", "properties": {"to": {"type": "integer", "minimum": 1}}}
    require = {"type": "object", "properties": {"require_canary": _BOOLEAN}}
    split = {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}

    def verb(summary: str, *parameters: Schema, failures: tuple[int, ...] = (), **rest: Any) -> Schema:
        return _operation(summary, _MODEL, *parameters, admin=True, failures=failures, **rest)

    fetch = {
        "type": "object",
        "required": ["from", "name"],
        "additionalProperties": False,
        "properties": {
            "from": _STRING,
            "name": {"type": "string", "minLength": 1},
            "sha256": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"},
            "label": _STRING,
            **dict.fromkeys(("partial", "allow_nonfinite", "allow_rounding", "measure"), _BOOLEAN),
        },
    }
    return {
        base: {"get": verb("Versions, what is staged, traffic")},
        base + "/fetch": {
            "get": verb("The places that weights may be fetched from"),
            "post": verb(
                "Fetch weights from a place that the operator allows, then as stage",
                body=fetch,
                success=(200, 201),
                failures=(409, 422, 502, 507),
            ),
        },
        base + "/stage": {
            "post": verb(
                "Upload weights (safetensors, npz, ONNX), check them, derive the engine's weights",
                *flags,
                _query("label", _STRING),
                body=_BINARY,
                kind="application/octet-stream",
                success=(200, 201),
                failures=(409, 422, 507),
            )
        },
        base + "/staged/{id}": {
            "get": verb("A staged weight set, with the whole report of its check", _ID),
            "delete": verb("Discard a staged weight set", _ID, failures=(409,)),
        },
        base + "/staged/{id}/canary": {
            "post": verb("Run golden inputs on a staged weight set", _ID, body=_CANARY, failures=(409, 422))
        },
        base + "/staged/{id}/commit": {
            "post": verb("Publish it", _ID, body=require, needs_body=False, failures=(409, 507))
        },
        base + "/rollback": {
            "post": verb("Publish an earlier version again", body=rollback, needs_body=False, failures=(409, 507))
        },
        base + "/versions": {"get": verb("The versions")},
        base + "/versions/{version}": {
            "get": verb("A version", _VERSION),
            "delete": verb("Free an earlier version", _VERSION, failures=(409,)),
        },
        base + "/diff": {
            "get": verb(
                "How far each weight moved",
                *(_query(name, {"type": "integer", "minimum": 1}, required=True) for name in ("from", "to")),
            )
        },
        base + "/traffic": {"put": verb("Split traffic between versions; {} ends the split", body=split)},
        base + "/events": {"get": verb("Follow what happens (server-sent events)", answer="text/event-stream")},
        base + "/events/recent": {"get": verb("The last events")},
    }


@cache
def description() -> Schema:
    """The whole description."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "onnx-refit", "version": __version__},
        "paths": {
            **_protocol(),
            **_refit(),
            "/metrics": {"get": _operation("Prometheus metrics", answer="text/plain")},
            "/openapi.json": {"get": _operation("This description")},
        },
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }
