"""Uvicorn's HTTP protocol with what it lacks: bounds on the headers' size and time, and a way to give up a body."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from onnx_refit.serve.direct import EXTENSION, Body

# A body of fewer digits than this is not worth a connection.
_DIGITS = 6
_TOO_LARGE = b'{"error":"the headers are too large"}'
_RESPONSE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_TOO_LARGE), _TOO_LARGE)
)


def bounded_protocol(header_bytes: int, header_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol class with these bounds; large bodies can be taken over (``direct.TakeOver``)."""

    class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]  # uvicorn is not in the type check's environment
        _in_head = True
        _head = 0
        _timer: asyncio.TimerHandle | None = None
        _given_up = False

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
            headers = dict(self.headers)
            length = headers.get(b"content-length", b"")
            # Under TLS the socket holds records, and only the transport can read them.
            if self.scheme == "http" and len(length) >= _DIGITS and b"transfer-encoding" not in headers:
                give_up = partial(self._give_up, self.cycle, int(length))
                self.scope["extensions"] = {EXTENSION: give_up}

        def on_header(self, name: bytes, value: bytes) -> None:
            self._head += len(name) + len(value) + 4
            super().on_header(name, value)

        def _give_up(self, cycle: RequestResponseCycle, length: int) -> Body | None:
            if self.transport.is_closing() or not cycle.more_body or cycle.disconnected:
                return None
            self.flow.pause_reading()
            if cycle.waiting_for_100_continue:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                cycle.waiting_for_100_continue = False
            duplicate = socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno()))
            first = bytes(cycle.body)
            # The parser will never see the end of this body, so the connection cannot carry another request; whoever
            # asks for the body the ordinary way is told that there is no more of it.
            self._given_up, cycle.keep_alive = True, False
            cycle.body, cycle.more_body = bytearray(), False
            cycle.message_event.set()
            return Body(first, length - len(first), duplicate)

        def data_received(self, data: bytes) -> None:
            if self._given_up:
                return
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
