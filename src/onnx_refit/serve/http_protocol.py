"""Uvicorn's HTTP protocol with two bounds it lacks: the size of the headers, and the time they may take."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = b'{"error":"the headers are too large"}'
_RESPONSE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_TOO_LARGE), _TOO_LARGE)
)


def bounded_protocol(header_bytes: int, header_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol class with these bounds."""

    class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]  # uvicorn is not in the type check's environment
        _in_head = True
        _head = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(header_seconds, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self._in_head, self._head = True, 0
            if self._timer is None:
                self._timer = self.loop.call_later(header_seconds, self.transport.close)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._stop_timer()
            super().on_headers_complete()

        def on_header(self, name: bytes, value: bytes) -> None:
            self._head += len(name) + len(value) + 4
            super().on_header(name, value)

        def data_received(self, data: bytes) -> None:
            before = self._head
            super().data_received(data)
            if self.transport.is_closing():
                return
            # A field that is not complete yet is known only by the bytes that came; complete ones are counted above.
            self._head = max(self._head, before + len(data)) if self._in_head else self._head
            if self._head > header_bytes:
                self.transport.write(_RESPONSE)
                self.transport.close()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedProtocol
