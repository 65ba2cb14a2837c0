"""The Open Inference Protocol over REST: inference, metadata, health, repository."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from onnx_refit._version import __version__
from onnx_refit.errors import InputError
from onnx_refit.serve.body import headers_of, read_body
from onnx_refit.serve.context import Context
from onnx_refit.serve.errors import status_of
from onnx_refit.serve.gateway import Receive, Send, send_bytes
from onnx_refit.serve.json_response import JsonResponse
from onnx_refit.serve.request import parse_version
from onnx_refit.serve.rest_codec import HEADER_LENGTH, decode_request, encode_response, parse_json
from onnx_refit.serve.tracing import request_span, text_headers

EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "onnx_refit"]
VERSION_HEADER = b"onnx-refit-version"
SPLIT_HEADER = b"onnx-refit-split-key"
_MAX_SPLIT_KEY = 256


class Infer:
    """``POST /v2/models/{model}[/versions/{version}]/infer``, written against ASGI itself: it is the hot path."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._limits = context.settings.limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One inference."""
        context, started = self._context, time.perf_counter()
        model = context.models.get(scope["path_params"]["model"])
        code = 500
        try:
            headers = headers_of(scope)
            with request_span("infer", text_headers(headers), model=model.name, protocol="http") as trace:
                context.require_serving()
                limits = self._limits
                body = await read_body(receive, headers, limit=limits.body_bytes, seconds=limits.request_seconds)
                length = headers.get(HEADER_LENGTH.encode())
                request = decode_request(body, None if length is None else length.decode("latin-1"))
                key = headers.get(SPLIT_HEADER)
                if key is not None:
                    if len(key) > _MAX_SPLIT_KEY:
                        raise InputError("the header onnx-refit-split-key is too long")
                    request = replace(request, split_key=key.decode("latin-1"))
                version = scope["path_params"].get("version") or headers.get(VERSION_HEADER, b"").decode("latin-1")
                response = await model.infer(request, parse_version(version))
                trace("version", response.version)
                data, length_of_json = encode_response(request, response)
            extra = [(VERSION_HEADER, str(response.version).encode())]
            kind = b"application/json"
            if length_of_json is not None:
                extra.append((HEADER_LENGTH.encode(), str(length_of_json).encode()))
                kind = b"application/octet-stream"
            code = 200
            await send_bytes(send, 200, data, kind, extra)
        except BaseException as error:
            code = status_of(error)
            raise
        finally:
            context.metrics.requests.labels(model.name, "http", str(code)).inc()
            context.metrics.request_seconds.labels(model.name, "http").observe(time.perf_counter() - started)


def routes(context: Context) -> list[Route]:
    """The routes of the protocol."""

    async def server(_: Request) -> Response:
        return JsonResponse({"name": "onnx-refit", "version": __version__, "extensions": EXTENSIONS})

    async def live(_: Request) -> Response:
        return JsonResponse({"live": True})

    async def ready(_: Request) -> Response:
        return JsonResponse({"ready": context.serving}, 200 if context.serving else 503)

    async def models(_: Request) -> Response:
        return JsonResponse({"models": [model.name for model in context.models]})

    async def metadata(request: Request) -> Response:
        model = context.models.get(request.path_params["model"])
        version = parse_version(request.path_params.get("version"))
        return JsonResponse(await asyncio.to_thread(model.metadata, version))

    async def model_ready(request: Request) -> Response:
        model = context.models.get(request.path_params["model"])
        version = parse_version(request.path_params.get("version"))
        if version is not None:
            await asyncio.to_thread(model.metadata, version)
        ready = model.online and context.serving
        return JsonResponse({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def config(request: Request) -> Response:
        return JsonResponse(context.models.get(request.path_params["model"]).config())

    async def index(request: Request) -> Response:
        wanted = {}
        body = await read_body(request.receive, headers_of(request.scope), limit=1 << 16, seconds=10)
        if body.strip():
            wanted = parse_json(body)
        return JsonResponse(
            [
                {"name": model.name, "version": str(model.engine.version), "state": state, "reason": reason}
                for model in context.models
                for state, reason in [("READY", "") if model.online else ("UNAVAILABLE", "unloaded")]
                if model.online or not wanted.get("ready")
            ]
        )

    def switch(online: bool) -> Any:
        async def handle(request: Request) -> Response:
            model = context.models.get(request.path_params["model"])
            await read_body(request.receive, headers_of(request.scope), limit=1 << 16, seconds=10)
            model.online = online
            return JsonResponse({"name": model.name, "state": "READY" if online else "UNAVAILABLE"})

        return handle

    base = "/v2/models/{model}"
    at_version = base + "/versions/{version}"
    return [
        Route(base + "/infer", Infer(context), methods=["POST"]),
        Route(at_version + "/infer", Infer(context), methods=["POST"]),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server),
        Route("/v2/models", models),
        Route(base, metadata),
        Route(at_version, metadata),
        Route(base + "/ready", model_ready),
        Route(at_version + "/ready", model_ready),
        Route(base + "/config", config),
        Route(at_version + "/config", config),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", switch(True), methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", switch(False), methods=["POST"]),
    ]
