"""Places that the operator lets weights come from, and the way of a file out of them, piece by piece.

A client names a place by its alias and a file in it by a relative name of plain components. The name never becomes a
path that is opened as a whole, nor a URL that may lead elsewhere: directories are walked down one component at a time
without following a link, and a URL's answer is taken only from the host and path that the operator chose.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import ssl
import stat
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from onnx_refit.errors import InputError
from onnx_refit.serve.errors import ServeError, SettingsError

_BLOCK = 1 << 20
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
# No dot in front: neither "..", nor what is hidden. No "%", ":", "\\" or control character in it.
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}")
_COMPONENTS = 16
_CONNECT_SECONDS = 30.0


class NoSuchFileError(ServeError):
    """There is no such file at the place, or none that may be taken."""

    def __init__(self, reason: str = "there is no such file") -> None:
        super().__init__(404, reason)


def parse_name(name: object) -> tuple[str, ...]:
    """A file's name in a place, as its components; InputError for anything that is not plain and relative."""
    if not isinstance(name, str) or not name:
        raise InputError("'name' must be the name of a file at that place")
    parts = tuple(name.split("/"))
    if len(parts) > _COMPONENTS or not all(_COMPONENT.fullmatch(part) for part in parts):
        raise InputError(
            "'name' is no plain relative name",
            hint="Components of letters, digits and . _ + = @ - that begin with a letter, digit or _, joined by /",
        )
    return parts


@dataclass(frozen=True)
class Opened:
    """A file on its way.

    Attributes:
        nbytes: its size, where the place says so.
        blocks: its bytes; reading blocks the thread. Raises ServeError where the way breaks off.
        close: let go of it, from any thread; what reads then fails.
    """

    nbytes: int | None
    blocks: Iterator[bytes]
    close: Callable[[], None]


class Origin(Protocol):
    """A place that weights may come from."""

    @property
    def needs_digest(self) -> bool:
        """Whether a client has to say what the file's hash is, because the way there protects nothing."""
        ...

    def open(self, parts: tuple[str, ...], seconds: float) -> Opened:
        """Open a file.

        Args:
            parts: its name, from ``parse_name``.
            seconds: how long one piece may take.

        Raises:
            NoSuchFileError: there is none, or it is none that may be taken.
            ServeError: the place cannot be reached.
        """
        ...


@dataclass(frozen=True)
class DirectoryOrigin:
    """A directory of the server's machine.

    Attributes:
        root: the directory; may be a link itself, nothing below it may.
    """

    root: Path
    needs_digest: bool = False

    def open(self, parts: tuple[str, ...], seconds: float) -> Opened:
        """See ``Origin.open``."""
        descriptor = self._walk(parts)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise NoSuchFileError("it is no regular file")
            file = os.fdopen(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise
        return Opened(found.st_size, _read_file(file.read), file.close)

    def _walk(self, parts: tuple[str, ...]) -> int:
        """A descriptor of the file. Each component is opened in the one before, so no link swapped in can lead out."""
        # O_NONBLOCK: a FIFO without a writer would hold the thread for ever.
        last = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        between = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            here = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ServeError(502, f"the place cannot be opened: {error.strerror}") from error
        try:
            for part in parts[:-1]:
                above, here = here, os.open(part, between, dir_fd=here)
                os.close(above)
            return os.open(parts[-1], last, dir_fd=here)
        except OSError as error:
            # Whether it is missing, a link or forbidden is the operator's business.
            raise NoSuchFileError from error
        finally:
            os.close(here)


@dataclass(frozen=True)
class UrlOrigin:
    """Everything below a URL. Redirects are refused, proxies of the environment are not used.

    Attributes:
        prefix: the URL, which ends with a slash.
    """

    prefix: str

    @property
    def needs_digest(self) -> bool:
        """Over http anybody on the way can put other bytes in."""
        return self.prefix.startswith("http:")

    def open(self, parts: tuple[str, ...], seconds: float) -> Opened:
        """See ``Origin.open``."""
        url = urllib.parse.urlsplit(self.prefix)
        wait = min(seconds, _CONNECT_SECONDS)
        connection: http.client.HTTPConnection
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(
                url.hostname or "", url.port, timeout=wait, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=wait)
        try:
            # Plain components need no quoting, which leaves nothing to be unquoted twice.
            connection.request("GET", url.path + "/".join(parts), headers={"Accept-Encoding": "identity"})
            response = connection.getresponse()
            self._require_file(response)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServeError(502, f"the place cannot be reached: {_kind(error)}") from error
        except BaseException:
            connection.close()
            raise
        return Opened(response.length, _read_response(response), _closer(connection))

    def _require_file(self, response: http.client.HTTPResponse) -> None:
        if response.status in (404, 410):
            raise NoSuchFileError
        if response.status != 200:
            what = "wants to redirect" if 300 <= response.status < 400 else "answered"
            raise ServeError(502, f"the place {what} ({response.status})")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise ServeError(502, "the place sends the file compressed")


def _kind(error: Exception) -> str:
    """What went wrong, without the address, which is the operator's business."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not valid"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _closer(connection: http.client.HTTPConnection) -> Callable[[], None]:
    socket = connection.sock

    def close() -> None:
        # Closing alone would leave a thread that reads from it waiting.
        with contextlib.suppress(OSError):
            if socket is not None:
                socket.shutdown(2)
        connection.close()

    return close


def _read_file(read: Callable[[int], bytes | None]) -> Iterator[bytes]:
    try:
        while block := read(_BLOCK):
            yield block
    except (OSError, ValueError) as error:
        raise ServeError(502, "the file broke off") from error


def _read_response(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while block := response.read(_BLOCK):
            yield block
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServeError(502, f"the file broke off: {_kind(error)}") from error
    # http.client ends a body that is too short like any other when it is read in pieces.
    if response.length:
        raise ServeError(502, "the file broke off")


def parse_origins(texts: tuple[str, ...]) -> dict[str, Origin]:
    """What an operator says: ``ALIAS=/directory`` or ``ALIAS=https://host/prefix``, each once.

    Raises:
        SettingsError: it is neither, the directory is not there, or a URL has more than host, port and path.
    """
    origins: dict[str, Origin] = {}
    for text in texts:
        alias, separator, place = text.partition("=")
        if not separator or not _ALIAS.fullmatch(alias) or not place:
            raise SettingsError(f"{text!r} is no place for weights", hint="Say ALIAS=/directory or ALIAS=https://host/")
        if alias in origins:
            raise SettingsError(f"two places for weights are called {alias!r}")
        origins[alias] = _url(place) if "://" in place else _directory(place)
    return origins


def _directory(place: str) -> DirectoryOrigin:
    root = Path(place).absolute()
    if not root.is_dir():
        raise SettingsError("is no directory", where=root, hint="Make it first")
    return DirectoryOrigin(root)


def _url(place: str) -> UrlOrigin:
    try:
        url = urllib.parse.urlsplit(place)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        sound = False
    if not sound or url.query or url.fragment or url.username is not None or re.search(r"[\s\x00-\x1f\\]", place):
        raise SettingsError("is no http or https URL of host, port and path", where=place)
    return UrlOrigin(place if place.endswith("/") else place + "/")


async def blocks_of(opened: Opened, seconds: float, threads: Executor) -> AsyncGenerator[bytes, None]:
    """A file's bytes on an event loop, the reading on other threads; closes the file.

    Raises:
        ServeError: 504 if it is not there whole after so many seconds; and as ``Opened.blocks``.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    block = await loop.run_in_executor(threads, next, opened.blocks, None)
            except TimeoutError as error:
                raise ServeError(504, f"the file was not there after {seconds:g} s") from error
            if block is None:
                return
            yield block
    finally:
        opened.close()
