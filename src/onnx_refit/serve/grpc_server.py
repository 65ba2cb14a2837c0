"""The Open Inference Protocol over gRPC, on the same event loop, queue and limits as REST."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onnx_refit._version import __version__
from onnx_refit.errors import MissingExtraError, OnnxRefitError
from onnx_refit.serve.auth import Gatekeeper, Need
from onnx_refit.serve.context import Context
from onnx_refit.serve.errors import status_of
from onnx_refit.serve.grpc_codec import decode_request, encode_response
from onnx_refit.serve.logs import log, request_id
from onnx_refit.serve.proto import messages
from onnx_refit.serve.request import parse_version
from onnx_refit.serve.rest_v2 import EXTENSIONS
from onnx_refit.serve.tracing import request_span, tracing

try:
    import grpc
    import grpc.aio
except ImportError as error:
    raise MissingExtraError("grpcio", "serve", "the gRPC server") from error

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class _Call:
    """What a method may know of a call.

    Attributes:
        metadata: of the client, by name.
        time_remaining: seconds until the client's deadline; None if it set none.
    """

    metadata: Mapping[str, Any]
    time_remaining: float | None


Handler = Callable[[Any, _Call], Awaitable[Any]]


class _Service:
    """The methods of the service; each takes a message and the call's context."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def ServerLive(self, message: Any, call: _Call) -> Any:  # noqa: N802 - the protocol's names
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, message: Any, call: _Call) -> Any:  # noqa: N802
        return messages.ServerReadyResponse(ready=self._context.serving)

    async def ModelReady(self, message: Any, call: _Call) -> Any:  # noqa: N802
        model = self._context.models.get(message.name)
        model.metadata(parse_version(message.version))
        return messages.ModelReadyResponse(ready=model.online and self._context.serving)

    async def ServerMetadata(self, message: Any, call: _Call) -> Any:  # noqa: N802
        return messages.ServerMetadataResponse(name="onnx-refit", version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(self, message: Any, call: _Call) -> Any:  # noqa: N802
        return messages.ModelMetadataResponse(
            **self._context.models.get(message.name).metadata(parse_version(message.version))
        )

    async def ModelInfer(self, message: Any, call: _Call) -> Any:  # noqa: N802
        context = self._context
        context.require_serving()
        model = context.models.get(message.model_name)
        started, code = time.perf_counter(), 500
        try:
            request = decode_request(message)
            # The client's deadline travels with every gRPC call; what is of no use to it need not run.
            left = call.time_remaining
            if left is not None:
                timeout = left if request.timeout is None else min(left, request.timeout)
                request = replace(request, timeout=max(timeout, 0.0))
            key = call.metadata.get("onnx-refit-split-key")
            if key is not None:
                request = replace(request, split_key=str(key))
            with request_span("infer", _carrier(call.metadata), model=model.name, protocol="grpc") as trace:
                response = await model.infer(request, parse_version(call.metadata.get("onnx-refit-version")))
                trace("version", response.version)
            code = 200
            return encode_response(request, response)
        except BaseException as error:
            code = status_of(error)
            raise
        finally:
            context.metrics.requests.labels(model.name, "grpc", str(code)).inc()
            context.metrics.request_seconds.labels(model.name, "grpc").observe(time.perf_counter() - started)

    async def RepositoryIndex(self, message: Any, call: _Call) -> Any:  # noqa: N802
        response = messages.RepositoryIndexResponse()
        for model in self._context.models:
            if model.online or not message.ready:
                state = "READY" if model.online else "UNAVAILABLE"
                response.models.add(name=model.name, version=str(model.engine.version), state=state)
        return response

    async def RepositoryModelLoad(self, message: Any, call: _Call) -> Any:  # noqa: N802
        model = self._switch(message, online=True)
        return messages.RepositoryModelLoadResponse(model_name=model, is_loaded=True)

    async def RepositoryModelUnload(self, message: Any, call: _Call) -> Any:  # noqa: N802
        model = self._switch(message, online=False)
        return messages.RepositoryModelUnloadResponse(model_name=model, is_unloaded=True)

    def _switch(self, message: Any, *, online: bool) -> str:
        model = self._context.models.get(message.second or message.first)
        model.online = online
        return model.name


_NEEDS = {
    "ServerLive": Need.NOTHING,
    "ServerReady": Need.NOTHING,
    "RepositoryModelLoad": Need.ADMIN,
    "RepositoryModelUnload": Need.ADMIN,
}
_METHODS = tuple(name for name in vars(_Service) if name[0].isupper())


def _carrier(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The metadata that is text, if anybody traces."""
    return {name: value for name, value in metadata.items() if isinstance(value, str)} if tracing() else {}


def _guarded(name: str, handler: Handler, gatekeeper: Gatekeeper, access_log: bool) -> Handler:
    """A method with access control, errors as status codes, and its log line."""
    need = _NEEDS.get(name, Need.INFER)

    async def handle(message: Any, call: Any) -> Any:
        started, status = time.perf_counter(), 200
        metadata = dict(call.invocation_metadata() or ())
        failed: BaseException | None = None
        try:
            authorization = metadata.get("authorization")
            gatekeeper.require(need, authorization.encode() if isinstance(authorization, str) else None)
            return await handler(message, _Call(metadata, call.time_remaining()))
        except Exception as error:  # noqa: BLE001 - the last line of defence: a status for the client, the rest for the log
            failed, status = error, status_of(error)
            text = str(error) if isinstance(error, OnnxRefitError) else "internal error; the server's log has it"
            await call.abort(_CODES.get(status, grpc.StatusCode.INTERNAL), text)
        finally:
            if access_log or status >= 500:
                unforeseen = failed is not None and not isinstance(failed, OnnxRefitError)
                given = metadata.get("x-request-id")
                log(
                    "request",
                    level=logging.ERROR if status == 500 else logging.INFO,
                    exception=failed if unforeseen else None,
                    request_id=request_id(given.encode() if isinstance(given, str) else None),
                    method=name,
                    protocol="grpc",
                    status=status,
                    seconds=round(time.perf_counter() - started, 6),
                )

    return handle


async def start_grpc(context: Context) -> tuple[Any, int]:
    """Start the gRPC server; returns it and the port it listens on.

    Raises:
        OSError: the port is taken.
    """
    settings = context.settings
    service, gatekeeper = _Service(context), Gatekeeper(settings)
    handlers = {}
    for name in _METHODS:
        guarded = _guarded(name, getattr(service, name), gatekeeper, settings.access_log)
        handlers[name] = grpc.unary_unary_rpc_method_handler(
            guarded,
            request_deserializer=getattr(messages, f"{name}Request").FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
    limits = settings.limits
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.max_concurrent_streams", limits.connections),
            # Two servers on one port would share its clients between them.
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=limits.connections,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(messages.SERVICE, handlers),))
    address = f"{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.grpc_port}"
    try:
        if settings.tls is None:
            port = server.add_insecure_port(address)
        else:
            pair = (settings.tls.key.read_bytes(), settings.tls.certificate.read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    await server.start()
    return server, port
