"""The Open Inference Protocol over Serve's HTTP proxies: inference, metadata, health. Refits go through the handle."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from onnx_refit._version import __version__
from onnx_refit.errors import InputError, OnnxRefitError
from onnx_refit.refit.live import Engine
from onnx_refit.serve.body import headers_of, read_body
from onnx_refit.serve.cluster.errors import ClusterError
from onnx_refit.serve.describe import config, metadata
from onnx_refit.serve.errors import ServeError, failure_of
from onnx_refit.serve.json_response import JsonResponse
from onnx_refit.serve.ray.answers import Answered
from onnx_refit.serve.request import InferRequest, InferResponse, parse_version
from onnx_refit.serve.rest_codec import HEADER_LENGTH, decode_request, encode_response

VERSION_HEADER = "onnx-refit-version"
EPOCH_HEADER = "onnx-refit-epoch"
FENCE_HEADER = b"onnx-refit-fence"
_BODY_BYTES = 64 << 20
_BODY_SECONDS = 60.0
_EPOCH_DIGITS = 18

Infer: TypeAlias = Callable[[InferRequest, int | None, int], Awaitable[Answered]]
"""Runs a request on a version (None: the current one), not older than an epoch."""


async def respond(request: Request, name: str, engine: Engine, infer: Infer) -> Response:
    """The response to one request.

    Args:
        request: what the proxy passed on.
        name: what the model is called.
        engine: describes it.
        infer: runs an inference; raises what is wrong with it.
    """
    try:
        return await _respond(request, name, engine, infer)
    except ClusterError as error:
        response = JsonResponse({"error": str(error)}, 503)
        response.headers["retry-after"] = "1"
        return response
    except OnnxRefitError as error:
        failure = failure_of(error)
        return JsonResponse(failure.body, failure.status)


async def _respond(request: Request, name: str, engine: Engine, infer: Infer) -> Response:
    path: str = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/"))
    match path.strip("/").split("/"):
        case ["v2"]:
            return JsonResponse({"name": "onnx-refit", "version": __version__, "extensions": ["binary_tensor_data"]})
        case ["v2", "health", "live" | "ready" as what]:
            return JsonResponse({what: True})
        case ["v2", "models"]:
            return JsonResponse({"models": [name]})
        case ["v2", "models", model, *rest] if model == name:
            version = None
            if rest[:1] == ["versions"] and len(rest) > 1:
                version, rest = parse_version(rest[1]), rest[2:]
            return await _model(request, name, engine, infer, version, rest)
    raise ServeError(404, "there is nothing at this path")


async def _model(
    request: Request, name: str, engine: Engine, infer: Infer, version: int | None, rest: list[str]
) -> Response:
    match request.method, rest:
        case "GET", []:
            return JsonResponse(metadata(name, engine, version))
        case "GET", ["ready"]:
            metadata(name, engine, version)
            return JsonResponse({"name": name, "ready": True})
        case "GET", ["config"]:
            return JsonResponse(config(name, engine))
        case "POST", ["infer"]:
            return await _infer(request, name, infer, version)
        case _, [] | ["ready"] | ["config"] | ["infer"]:
            raise ServeError(405, f"{request.method} is not for this path")
    raise ServeError(404, "there is nothing at this path")


async def _infer(request: Request, name: str, infer: Infer, version: int | None) -> Response:
    headers = headers_of(request.scope)
    body = await read_body(request.receive, headers, limit=_BODY_BYTES, seconds=_BODY_SECONDS)
    length = headers.get(HEADER_LENGTH.encode())
    asked = decode_request(body, None if length is None else length.decode("latin-1"))
    if version is None:
        version = parse_version(headers.get(VERSION_HEADER.encode(), b"").decode("latin-1")) or asked.version
    found = await infer(asked, version, _fence(headers.get(FENCE_HEADER)))
    data, json_bytes = encode_response(asked, InferResponse(name, found.version, found.outputs))
    kind = "application/json" if json_bytes is None else "application/octet-stream"
    extra = {} if json_bytes is None else {HEADER_LENGTH: str(json_bytes)}
    named = {VERSION_HEADER: str(found.version), EPOCH_HEADER: str(found.epoch)}
    return Response(data, media_type=kind, headers={**named, **extra})


def _fence(value: bytes | None) -> int:
    if value is None:
        return 0
    if not value.isdigit() or len(value) > _EPOCH_DIGITS:
        raise InputError(f"the header {FENCE_HEADER.decode()} is no epoch")
    return int(value)
