"""Reading an upload straight from its socket, past the event loop.

Through the event loop every piece of a body is copied half a dozen times, and each pause and resumption of reading
takes its turn between two inferences: 14 ms of the loop for 8 MB. Here the HTTP protocol gives up the socket once the
headers are parsed; the loop only learns when there is something to read, and a thread of low priority reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from onnx_refit.serve.body import Buffer, chunks
from onnx_refit.serve.errors import ServeError

EXTENSION = "onnx_refit.direct"
"""Key of the ASGI scope's ``extensions`` that holds a ``TakeOver``, where the connection allows it."""

_BLOCK = 2 << 20
_AT_ONCE = 1 << 20
_PATIENCE_SECONDS = 0.02
_DRAIN_BYTES = 256 << 20
_DRAIN_SECONDS = 5.0


@dataclass(frozen=True)
class Body:
    """A body whose connection was given up by the HTTP protocol; the connection closes after the response.

    Attributes:
        first: what had been read of it already.
        remaining: bytes that are still to come.
        socket: a duplicate of the connection's, not blocking; whoever takes the body closes it.
    """

    first: bytes
    remaining: int
    socket: socket.socket


TakeOver = Callable[[], Body | None]
"""Gives the rest of a body; None where there is nothing to gain (all of it is there), or no length was announced."""


async def blocks(body: Body, seconds: float, executor: Executor) -> AsyncGenerator[Buffer, None]:
    """The body in large blocks; each is valid until the next one is asked for. Closes the socket.

    Args:
        body: what was taken over.
        seconds: time for all of it.
        executor: where to read.

    Raises:
        ServeError: 408 if it is not complete in time, 400 if the client went away.
    """
    reader = _Reader(body)
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        if body.first:
            yield body.first
        while reader.remaining:
            try:
                async with asyncio.timeout_at(deadline):
                    await reader.readable()
            except TimeoutError as error:
                raise ServeError(408, f"the body was not complete after {seconds:g} s") from error
            size = await reader.in_thread(executor)
            if size:
                yield reader.view[:size]
    finally:
        if reader.remaining and not reader.gone:
            # A socket closed with unread bytes is reset, and the client would never read why it was refused.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await reader.drain()
        reader.close()


class _Reader:
    """The event loop's and the thread's side of one body; only one of them uses it at a time."""

    def __init__(self, body: Body) -> None:
        self._socket, self.remaining = body.socket, body.remaining
        self.view = memoryview(b"")
        self.gone = False

    async def readable(self) -> None:
        """Wait on the event loop until a good deal came, or the rest, or the end."""
        # Woken by every packet, the loop and the thread would take turns hundreds of times.
        if self.remaining > 1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await self._has(min(_AT_ONCE, self.remaining))
                return
        # The sender may be slow, or wait for a larger window than the socket's memory allows just now.
        await self._has(1)

    async def _has(self, size: int) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
        loop = asyncio.get_running_loop()
        came = loop.create_future()
        loop.add_reader(self._socket.fileno(), lambda: None if came.done() else came.set_result(None))
        try:
            await came
        finally:
            loop.remove_reader(self._socket.fileno())

    async def in_thread(self, executor: Executor) -> int:
        """Read what is there into the view; how much it was."""
        reading = asyncio.get_running_loop().run_in_executor(executor, self._read)
        try:
            size = await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait([reading])  # the thread still uses the socket
            raise
        self.remaining -= size
        return size

    def _read(self) -> int:
        if not self.view:  # made here: clearing so much memory is not for the event loop
            self.view = memoryview(bytearray(min(_BLOCK, self.remaining)))
        try:
            size = self._socket.recv_into(self.view, min(len(self.view), self.remaining))
        except BlockingIOError:
            return 0
        except OSError:
            size = 0
        if not size:
            self.gone = True
            raise ServeError(400, "the client went away")
        return size

    async def drain(self) -> None:
        """Take what is still coming, within bounds; for a refused body."""
        left = min(self.remaining, _DRAIN_BYTES)
        while left > 0:
            await self.readable()
            try:
                got = len(self._socket.recv(1 << 16))
            except BlockingIOError:
                continue
            except OSError:
                return
            if not got:
                return
            left -= got

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


def body_chunks(scope: Any, receive: Any, seconds: float, executor: Executor) -> AsyncGenerator[Buffer, None]:
    """A request's body in pieces: straight from the socket where the connection allows it, else the ordinary way.

    Args:
        scope: the ASGI scope.
        receive: ASGI's, for the ordinary way.
        seconds: time for all of it.
        executor: where to read.

    Raises:
        ServeError: see ``blocks``.
    """
    take_over: TakeOver | None = scope.get("extensions", {}).get(EXTENSION)
    body = None if take_over is None else take_over()
    return chunks(receive, seconds) if body is None else blocks(body, seconds, executor)
