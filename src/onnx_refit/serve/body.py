"""Reading the body of a request: bounded in size and in time, compressed or not."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from typing import Any

from onnx_refit.serve.errors import ServeError

Headers = dict[bytes, bytes]
Buffer = bytes | bytearray | memoryview


def headers_of(scope: Any) -> Headers:
    """The headers of a request by lower-case name; of a repeated one the last."""
    return dict(scope["headers"])


def require_length(headers: Headers, limit: int) -> None:
    """ServeError 413 if the announced length is over the limit, before a byte of the body is taken."""
    announced = headers.get(b"content-length", b"0")
    if not announced.isdigit():
        raise ServeError(400, "the header Content-Length is no number")
    if int(announced[:20]) > limit:
        raise ServeError(413, f"the body of {int(announced[:20])} bytes is larger than the {limit} allowed")


async def chunks(receive: Any, seconds: float) -> AsyncGenerator[Buffer, None]:
    """The body in pieces.

    Raises:
        ServeError: 408 if it is not complete after so many seconds, 400 if the client went away.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            # Only the wait is bounded here: around a ``yield`` it would interrupt whatever the caller is doing.
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as error:
            raise ServeError(408, f"the body was not complete after {seconds:g} s") from error
        if message["type"] == "http.disconnect":
            raise ServeError(400, "the client went away")
        piece: bytes = message.get("body", b"")
        if piece:
            yield piece
        if not message.get("more_body", False):
            return


async def read_body(receive: Any, headers: Headers, *, limit: int, seconds: float) -> bytes:
    """The whole body, decompressed.

    Raises:
        ServeError: too large (before or after decompression), too slow, of an unknown encoding, or not what the
            encoding says.
    """
    require_length(headers, limit)
    message = await receive() if b"content-length" in headers else None
    if message is not None and message["type"] == "http.request" and not message.get("more_body", False):
        # The usual case: it came in one piece.
        whole: bytes = message.get("body", b"")
    else:
        whole = await _collect(receive, message, limit, seconds)
    encoding = headers.get(b"content-encoding", b"identity").lower()
    return whole if encoding == b"identity" else _decompress(whole, encoding, limit)


async def _collect(receive: Any, first: Any, limit: int, seconds: float) -> bytes:
    parts: list[Buffer] = []
    total = 0

    async def again() -> Any:
        nonlocal first
        if first is None:
            return await receive()
        message, first = first, None
        return message

    async for piece in chunks(again, seconds):
        total += len(piece)
        if total > limit:
            raise ServeError(413, f"the body is larger than the {limit} bytes allowed")
        parts.append(piece)
    return b"".join(parts)


def _decompress(data: bytes, encoding: bytes, limit: int) -> bytes:
    # RFC 9110: "deflate" is the zlib format; 32 added to the window bits lets zlib tell it from gzip itself.
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        raise ServeError(415, "the encoding of the body is not known", hint="Known are gzip and deflate")
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ServeError(400, "the body is not what its encoding says") from error
    if len(plain) > limit:
        raise ServeError(413, f"the decompressed body is larger than the {limit} bytes allowed")
    if not stream.eof:
        raise ServeError(400, "the compressed body ends too early")
    return plain
