"""Bodies that do not come through the event loop: what the HTTP protocol gives up, and what is left to do with it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EXTENSION = "onnx_refit.direct"
"""Key of the ASGI scope's ``extensions`` that holds a ``TakeOver``, where the connection allows it."""

_DRAIN_BYTES = 256 << 20
_DRAIN_SECONDS = 5.0
_PIECE = 1 << 16


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


def taken_over(scope: Any) -> Body | None:
    """A request's body, if its connection can be taken over; else it comes the ordinary way."""
    take_over: TakeOver | None = scope.get("extensions", {}).get(EXTENSION)
    return None if take_over is None else take_over()


async def readable(file: int) -> None:
    """Wait until something can be read from a descriptor, or it ended."""
    loop = asyncio.get_running_loop()
    came: asyncio.Future[None] = loop.create_future()
    loop.add_reader(file, lambda: None if came.done() else came.set_result(None))
    try:
        await came
    finally:
        loop.remove_reader(file)


async def drain(connection: socket.socket, left: int) -> None:
    """Take what is still coming of a refused body, within bounds.

    A socket closed with unread bytes is reset, and the client would never read why it was refused.
    """
    left = min(left, _DRAIN_BYTES)
    with contextlib.suppress(TimeoutError, OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0:
                await readable(connection.fileno())
                with contextlib.suppress(BlockingIOError):
                    got = len(connection.recv(_PIECE))
                    if not got:
                        return
                    left -= got
