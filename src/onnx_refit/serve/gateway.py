"""The outermost layer of the HTTP application: identity, access, errors, log lines and counters of every request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from onnx_refit.errors import OnnxRefitError
from onnx_refit.serve.auth import Gatekeeper, need_of
from onnx_refit.serve.body import Headers, headers_of
from onnx_refit.serve.errors import Failure, failure_of
from onnx_refit.serve.logs import log, request_id
from onnx_refit.serve.metrics import Metrics
from onnx_refit.serve.tracing import request_span, text_headers, tracing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

JSON = b"application/json"
_DRAIN_BYTES = 256 << 20
_DRAIN_SECONDS = 5.0
# Sent with every response; the console's page adds what it needs itself.
_SECURITY = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


async def send_json(send: Send, status: int, body: object, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send a JSON response."""
    data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    await send_bytes(send, status, data, JSON, headers)


async def send_bytes(
    send: Send, status: int, data: bytes, content_type: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Send a whole response."""
    start = [(b"content-type", content_type), (b"content-length", str(len(data)).encode()), *(headers or ())]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": data})


class Gateway:
    """Wraps the application.

    Args:
        app: the application; its errors become responses here.
        gatekeeper: who may do what.
        metrics: where to count.
        access_log: whether every request gets a log line; failures always do.
    """

    def __init__(self, app: App, gatekeeper: Gatekeeper, metrics: Metrics, *, access_log: bool) -> None:
        self._app, self._gatekeeper, self._metrics, self._access_log = app, gatekeeper, metrics, access_log

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        headers = headers_of(scope)
        identity = request_id(headers.get(b"x-request-id"))
        status = 0
        received = False

        async def take() -> Message:
            nonlocal received
            message = await receive()
            received = not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode()), *_SECURITY]
            await send(message)

        error: BaseException | None = None
        try:
            self._gatekeeper.require(need_of(scope["path"]), headers.get(b"authorization"))
            with _traced(scope, headers):
                await self._app(scope, take, answer)
        except asyncio.CancelledError:
            raise
        except Exception as caught:  # noqa: BLE001 - the last line of defence: a response for the client, the rest for the log
            error = caught
            failure, extra = _failure(caught)
            if not status:
                if not received and b"expect" not in headers:
                    await _drain(take)
                await send_json(answer, failure.status, {**failure.body, "request_id": identity}, extra)
        finally:
            self._account(scope, status, identity, time.perf_counter() - started, error)

    def _account(
        self, scope: MutableMapping[str, Any], status: int, identity: str, seconds: float, error: BaseException | None
    ) -> None:
        self._metrics.http.labels(_method(scope["method"]), str(status)).inc()
        unforeseen = error is not None and not isinstance(error, OnnxRefitError | HTTPException)
        if self._access_log or status >= 500 or unforeseen:
            log(
                "request",
                level=logging.ERROR if status == 500 or unforeseen else logging.INFO,
                exception=error if unforeseen else None,
                request_id=identity,
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                seconds=round(seconds, 6),
                client=(scope.get("client") or ("",))[0],
                **({"error": str(error)} if error is not None else {}),
            )


def _traced(scope: MutableMapping[str, Any], headers: Headers) -> contextlib.AbstractContextManager[object]:
    """The span of a request that changes weights or traffic; inferences have one of their own."""
    if scope["method"] == "GET" or "/refit" not in scope["path"] or not tracing():
        return contextlib.nullcontext()
    parts = scope["path"].split("/")
    # Ids and versions stay out of the name, so that there are few names.
    verb = next((part for part in reversed(parts) if part.isalpha()), "refit")
    name = f"{scope['method']} {verb}"
    return request_span(name, text_headers(headers), model=parts[3][:100] if len(parts) > 3 else "", protocol="http")


async def _drain(receive: Receive) -> None:
    """Take what is still coming of a refused body, within bounds.

    Closing a connection that still receives resets it, and the client would never read why it was refused.
    """
    taken = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while taken < _DRAIN_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _method(method: str) -> str:
    """The method as a label; whatever clients make up must not make new series."""
    return method if method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH") else "other"


def _failure(error: BaseException) -> tuple[Failure, list[tuple[bytes, bytes]]]:
    extra: list[tuple[bytes, bytes]] = []
    if isinstance(error, HTTPException):
        extra += [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
        return Failure(error.status_code, {"error": error.detail}), extra
    failure = failure_of(error)
    if failure.retry_after is not None:
        extra.append((b"retry-after", str(failure.retry_after).encode()))
    if failure.status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    return failure, extra
