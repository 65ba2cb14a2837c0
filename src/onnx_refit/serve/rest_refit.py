"""The refit verbs over REST: stage, canary, commit, rollback, versions, diff, traffic, events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from onnx_refit.errors import InputError
from onnx_refit.refit.canary import Canary
from onnx_refit.serve.body import chunks, headers_of, read_body, require_length
from onnx_refit.serve.context import Context
from onnx_refit.serve.direct import taken_over
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.intake import FLAGS, parse_label, parse_sha256, receive_and_stage
from onnx_refit.serve.json_response import JsonResponse
from onnx_refit.serve.model import ServedModel
from onnx_refit.serve.request import parse_version
from onnx_refit.serve.rest_codec import HEADER_LENGTH, decode_request, parse_json
from onnx_refit.serve.spool import Upload
from onnx_refit.serve.staging import StageOptions
from onnx_refit.serve.traffic import make_split

_SMALL = 1 << 20


def routes(context: Context) -> list[Route]:
    """The routes of the refit verbs."""
    limits = context.settings.limits

    def model_of(request: Request) -> ServedModel:
        return context.models.get(request.path_params["model"])

    async def small_json(request: Request) -> dict[str, Any]:
        body = await read_body(request.receive, headers_of(request.scope), limit=_SMALL, seconds=10)
        return parse_json(body) if body.strip() else {}

    async def status(request: Request) -> Response:
        model = model_of(request)
        account = await context.at_desk(model.desk.status)
        split = None if model.traffic is None else model.traffic.to_json()
        return JsonResponse({**account, "traffic": split, "online": model.online, **model.load})

    async def stage(request: Request) -> Response:
        context.require_serving()
        model = model_of(request)
        options = StageOptions(**{name: _flag(request, name) for name in FLAGS})
        label = parse_label(request.query_params.get("label", "upload"))
        headers = headers_of(request.scope)
        require_length(headers, limits.upload_bytes)
        announced = headers.get(b"x-content-sha256")
        sha256 = parse_sha256(None if announced is None else announced.decode("latin-1"), "the header X-Content-Sha256")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise ServeError(415, "uploads are taken uncompressed")
        total = int(headers[b"content-length"]) if b"content-length" in headers else None
        spool, seconds = context.spool, limits.upload_seconds

        def receive(progress: Callable[[int], None]) -> Awaitable[Upload]:
            body = taken_over(request.scope) if spool.receiver.ready else None
            if body is not None:
                return spool.take(body, seconds=seconds, progress=progress, sha256=sha256)
            ordinary = chunks(request.receive, seconds)
            return spool.receive(ordinary, limit=limits.upload_bytes, progress=progress, sha256=sha256)

        return await receive_and_stage(context, model, receive, options, label, total)

    async def staged(request: Request) -> Response:
        return JsonResponse(await context.at_desk(partial(model_of(request).desk.staged, request.path_params["id"])))

    async def discard(request: Request) -> Response:
        return JsonResponse(await context.at_desk(partial(model_of(request).desk.discard, request.path_params["id"])))

    async def canary(request: Request) -> Response:
        model = model_of(request)
        headers = headers_of(request.scope)
        body = await read_body(request.receive, headers, limit=limits.body_bytes, seconds=limits.request_seconds)
        length = headers.get(HEADER_LENGTH.encode())
        made = _canary(body, None if length is None else length.decode("latin-1"))
        return JsonResponse(await context.at_desk(partial(model.desk.canary, request.path_params["id"], made)))

    async def commit(request: Request) -> Response:
        context.require_serving()
        model = model_of(request)
        require = bool((await small_json(request)).get("require_canary"))
        work = partial(model.desk.commit, request.path_params["id"], require_canary=require)
        account = await context.at_desk(work)
        if not account["repeated"]:
            _end_split(model)
        return JsonResponse(account)

    async def rollback(request: Request) -> Response:
        model = model_of(request)
        to = parse_version((await small_json(request)).get("to"))
        account = await context.at_desk(partial(model.desk.rollback, to))
        _end_split(model)
        return JsonResponse(account)

    async def versions(request: Request) -> Response:
        return JsonResponse((await context.at_desk(model_of(request).desk.status))["versions"])

    async def version(request: Request) -> Response:
        number = _required(request.path_params["version"])
        return JsonResponse(await context.at_desk(partial(model_of(request).desk.version, number)))

    async def delete(request: Request) -> Response:
        number = _required(request.path_params["version"])
        await context.at_desk(partial(model_of(request).desk.delete, number))
        return JsonResponse({"deleted": number})

    async def diff(request: Request) -> Response:
        before, after = (_required(request.query_params.get(name)) for name in ("from", "to"))
        return JsonResponse(await context.at_desk(partial(model_of(request).desk.diff, before, after)))

    async def split(request: Request) -> Response:
        model = model_of(request)
        made = make_split(await small_json(request))
        await context.at_desk(partial(model.split_traffic, made))
        return JsonResponse({"traffic": None if made is None else made.to_json()})

    async def recent(request: Request) -> Response:
        return JsonResponse(model_of(request).events.recent)

    async def events(request: Request) -> Response:
        model = model_of(request)
        last = request.headers.get("last-event-id", request.query_params.get("after", ""))
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 16 else None
        return StreamingResponse(model.events.follow(after), media_type="text/event-stream")

    base = "/v2/models/{model}/refit"
    return [
        Route(base, status),
        Route(base + "/stage", stage, methods=["POST"]),
        Route(base + "/staged/{id}", staged),
        Route(base + "/staged/{id}", discard, methods=["DELETE"]),
        Route(base + "/staged/{id}/canary", canary, methods=["POST"]),
        Route(base + "/staged/{id}/commit", commit, methods=["POST"]),
        Route(base + "/rollback", rollback, methods=["POST"]),
        Route(base + "/versions", versions),
        Route(base + "/versions/{version}", version),
        Route(base + "/versions/{version}", delete, methods=["DELETE"]),
        Route(base + "/diff", diff),
        Route(base + "/traffic", split, methods=["PUT"]),
        Route(base + "/events", events),
        Route(base + "/events/recent", recent),
    ]


def _end_split(model: ServedModel) -> None:
    """A split names versions; whoever publishes another one wants it to answer."""
    if model.traffic is not None:
        model.traffic = None
        model.events.publish("traffic", split=None)


def _canary(body: bytes, header_length: str | None) -> Canary:
    """A canary from an inference request; ``expect`` holds outputs in the form of an inference response."""
    request = decode_request(body, header_length)
    size = len(body) if header_length is None else int(header_length)
    data = parse_json(memoryview(body)[:size])
    expected = data.get("expect")
    expect = None
    if expected is not None:
        if header_length is not None:
            raise InputError("expected outputs travel as JSON, without the binary extension")
        expect = decode_request(orjson.dumps({"inputs": expected}), None).inputs
    return Canary(request.inputs, expect, _tolerance(data, "rtol", 1e-4), _tolerance(data, "atol", 1e-5))


def _tolerance(data: dict[str, Any], name: str, default: float) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise InputError(f"{name!r} must be a number that is not negative")
    return float(value)


def _required(text: object) -> int:
    version = parse_version(text)
    if version is None:
        raise InputError("a version is needed")
    return version


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise InputError(f"{name!r} must be true or false")
    return bool(value == "true")
