"""The refit verb that points to weights instead of sending them: from a place that the operator has allowed."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from onnx_refit.errors import InputError
from onnx_refit.serve.body import headers_of, read_body
from onnx_refit.serve.context import Context
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.intake import FLAGS, parse_label, parse_sha256, receive_and_stage
from onnx_refit.serve.json_response import JsonResponse
from onnx_refit.serve.origins import Origin, blocks_of, parse_name
from onnx_refit.serve.rest_codec import parse_json
from onnx_refit.serve.staging import StageOptions

_SMALL = 1 << 16
_FIELDS = frozenset({"from", "name", "sha256", "label", *FLAGS})


def routes(context: Context) -> list[Route]:
    """The routes of the verb."""
    limits = context.settings.limits
    origins = context.settings.weights_from

    async def places(request: Request) -> Response:
        context.models.get(request.path_params["model"])
        return JsonResponse({"from": sorted(origins)})

    async def fetch(request: Request) -> Response:
        context.require_serving()
        model = context.models.get(request.path_params["model"])
        headers = headers_of(request.scope)
        order = parse_json(await read_body(request.receive, headers, limit=_SMALL, seconds=limits.header_seconds))
        unknown = sorted(order.keys() - _FIELDS)
        if unknown:
            raise InputError(f"there is no {unknown[0][:40]!r} to say here", hint=f"Known are {', '.join(_FIELDS)}")
        alias, origin = _place(origins, order.get("from"))
        parts = parse_name(order.get("name"))
        sha256 = parse_sha256(order.get("sha256"), "'sha256'")
        if sha256 is None and origin.needs_digest:
            raise InputError("this place is reached without TLS, so 'sha256' must say what the file is")
        options = StageOptions(**{name: _flag(order, name) for name in FLAGS})
        label = parse_label(order.get("label", f"{alias}:{'/'.join(parts)}"[:120]))
        loop = asyncio.get_running_loop()
        opened = await loop.run_in_executor(context.spool.threads, origin.open, parts, limits.upload_seconds)
        total = opened.nbytes
        if total is not None and total > limits.upload_bytes:
            opened.close()
            raise ServeError(413, f"the file of {total} bytes is larger than the {limits.upload_bytes} allowed")
        return await receive_and_stage(
            context,
            model,
            lambda progress: context.spool.receive(
                blocks_of(opened, limits.upload_seconds, context.spool.threads),
                limit=limits.upload_bytes,
                progress=progress,
                sha256=sha256,
            ),
            options,
            label,
            total,
        )

    path = "/v2/models/{model}/refit/fetch"
    return [Route(path, places), Route(path, fetch, methods=["POST"])]


def _place(origins: Any, alias: object) -> tuple[str, Origin]:
    origin = origins.get(alias) if isinstance(alias, str) else None
    if origin is None:
        raise ServeError(
            404,
            "there is no such place for weights",
            hint=f"The places are {', '.join(sorted(origins))}" if origins else "The server was started without any",
        )
    return str(alias), origin


def _flag(order: dict[str, Any], name: str) -> bool:
    value = order.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name!r} must be true or false")
    return value
