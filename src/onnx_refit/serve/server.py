"""A whole server: models, HTTP, gRPC, signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onnx_refit.errors import MissingExtraError
from onnx_refit.refit.live import Engine
from onnx_refit.serve.app import make_app
from onnx_refit.serve.context import Context
from onnx_refit.serve.errors import SettingsError
from onnx_refit.serve.http_protocol import bounded_protocol
from onnx_refit.serve.logs import log
from onnx_refit.serve.metrics import Metrics
from onnx_refit.serve.model import ModelTable, ServedModel
from onnx_refit.serve.settings import Settings
from onnx_refit.serve.spool import Spool

try:
    import uvicorn
except ImportError as error:
    raise MissingExtraError("uvicorn", "serve", "the server") from error

# The event loop must not wait 5 ms for another thread's turn to end; see docs/serving.md, "Throughput".
_SWITCH_SECONDS = 0.0001
_KEEP_ALIVE_SECONDS = 75


@dataclass(frozen=True)
class Addresses:
    """Where a server listens."""

    http: str
    grpc: str | None


class _HttpServer(uvicorn.Server):  # type: ignore[misc]  # uvicorn is not in the type check's environment
    """Uvicorn without its signal handlers: the whole server stops, not only its HTTP half."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class Server:
    """Serves engines until it is told to stop.

    Args:
        engines: name -> engine; the server closes them.
        settings: what the operator chose.

    Raises:
        SettingsError: it would listen beyond this machine with refits open to everybody.
        StoreLockedError: another server uses the spool.
    """

    def __init__(self, engines: Mapping[str, Engine], settings: Settings) -> None:
        if not engines:
            raise SettingsError("there is nothing to serve")
        self._settings = settings
        spool = Spool(settings.spool)
        metrics = Metrics()
        table = ModelTable([ServedModel(name, engine, settings, metrics) for name, engine in engines.items()])
        self.context = Context(settings, table, metrics, spool)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begin to stop: refuse new requests, finish the running ones. Call it on the event loop's thread."""
        self._stopping.set()

    async def run(self, started: Callable[[Addresses], None] = lambda addresses: None) -> bool:
        """Serve until ``stop`` or SIGTERM or SIGINT; a second signal ends it at once.

        Args:
            started: called with the addresses when the server takes requests.

        Returns:
            Whether every inference had ended; one that has not cannot be interrupted, and keeps its thread.

        Raises:
            OSError: a port is taken.
        """
        with self._signals():
            try:
                async with self._listening() as addresses:
                    self.context.serving = True
                    log(
                        "serving",
                        http=addresses.http,
                        grpc=addresses.grpc,
                        models=[m.name for m in self.context.models],
                    )
                    started(addresses)
                    sweeper = asyncio.create_task(self._sweep())
                    await self._stopping.wait()
                    sweeper.cancel()
                    log("stopping", drain_seconds=self._settings.drain_seconds)
                    self.context.serving = False
                    for model in self.context.models:
                        model.events.close()
            finally:
                ended = await asyncio.to_thread(self.context.close)
        log("stopped" if ended else "stopped while inferences were still running")
        return ended

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[Addresses]:
        settings = self._settings
        tls = settings.tls
        http = _HttpServer(
            uvicorn.Config(
                make_app(self.context),
                host=settings.host,
                port=settings.port,
                http=bounded_protocol(settings.limits.header_bytes, settings.limits.header_seconds),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=settings.limits.connections,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(settings.drain_seconds) or 1,
                ssl_certfile=None if tls is None else str(tls.certificate),
                ssl_keyfile=None if tls is None else str(tls.key),
            )
        )
        listener = _listen(settings.host, settings.port)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        while not http.started and not serving.done():
            await asyncio.sleep(0.005)
        if serving.done():
            serving.result()
        grpc_server = None
        try:
            scheme = "http" if tls is None else "https"
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            grpc_address = None
            if settings.grpc_port is not None:
                from onnx_refit.serve.grpc_server import start_grpc

                grpc_server, port = await start_grpc(self.context)
                grpc_address = f"{host}:{port}"
            yield Addresses(f"{scheme}://{host}:{listener.getsockname()[1]}", grpc_address)
        finally:
            http.should_exit = True
            if grpc_server is not None:
                await grpc_server.stop(self._settings.drain_seconds)
            await serving

    async def _sweep(self) -> None:
        """Discard what was staged and forgotten, now and then."""
        while True:
            await asyncio.sleep(min(60.0, self._settings.limits.staged_seconds))
            for model in self.context.models:
                await self.context.at_desk(model.desk.expire)

    @contextlib.contextmanager
    def _signals(self) -> Any:
        loop = asyncio.get_running_loop()

        def handle() -> None:
            if self._stopping.is_set():
                # Asked twice: whoever asks does not want to wait for running requests.
                sys.stderr.flush()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
            self._stopping.set()

        installed = []
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                # Only the main thread may; a server in another one is stopped by ``stop``.
                loop.add_signal_handler(number, handle)
                installed.append(number)
        try:
            yield
        finally:
            for number in installed:
                loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    """A socket on an address, IPv4 or IPv6; OSError if it is taken or not this machine's."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def serve(
    engines: Mapping[str, Engine],
    settings: Settings,
    started: Callable[[Addresses], None] = lambda addresses: None,
) -> bool:
    """Serve engines in this thread until a signal comes; returns and raises as ``Server`` and ``Server.run``."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    # What exists now lives as long as the server; walking it in every full collection would show in the latency.
    gc.collect()
    gc.freeze()
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop

    async def main() -> bool:
        return await Server(engines, settings).run(started)

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())
