"""Uploads: streamed to disk under a name of the server's, counted, bounded, and hashed on the way."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from onnx_refit.errors import StoreLockedError
from onnx_refit.files import write_error
from onnx_refit.serve.body import Buffer
from onnx_refit.serve.direct import Body
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.priority import background_pool
from onnx_refit.serve.receiver import Received, Receiver

_BLOCK = 1 << 20
_THREADS = 2
_PREFIX = "upload-"


@dataclass(frozen=True)
class Upload:
    """A file received whole.

    Attributes:
        path: where it lies, alone in a directory of its own.
        sha256: of its bytes, in hex.
        nbytes: its size.
        release: see ``Received``.
    """

    path: Path
    sha256: str
    nbytes: int
    release: Callable[[], None] = lambda: None

    def remove(self) -> None:
        """Delete it, once; what has it mapped keeps its contents."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()
        self.release()


class Spool:
    """The directory of uploads. Leftovers of a server that was killed are removed when the next one starts.

    Args:
        directory: where to; None makes a temporary directory, removed by ``close``.

    Raises:
        StoreLockedError: another server uses the directory.
        WriteError: it cannot be written.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._temporary = directory is None
        self._directory = Path(tempfile.mkdtemp(prefix="onnx-refit-spool-")) if directory is None else directory
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self._directory / "lock").open("w")
        except OSError as error:
            raise write_error(self._directory, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreLockedError("another server uses this spool", where=self._directory) from error
        for leftover in self._directory.glob(f"{_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._threads = background_pool(_THREADS, "onnx-refit-spool")
        self.receiver = Receiver()

    @property
    def threads(self) -> Executor:
        """Threads for what uploads need: reading, hashing, writing."""
        return self._threads

    def remove(self, upload: Upload) -> None:
        """Delete an upload soon: freeing a large file takes longer than an inference may wait."""
        self._threads.submit(upload.remove)

    def close(self) -> None:
        """Give the directory free."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.receiver.close()
        self._lock.close()
        if self._temporary:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def receive(
        self,
        chunks: AsyncGenerator[Buffer, None],
        *,
        limit: int,
        progress: Callable[[int], None],
        sha256: str | None = None,
    ) -> Upload:
        """Write chunks to a new file.

        Args:
            chunks: the bytes; a piece may be overwritten once the next one is asked for. Closed in any case.
            limit: how many are allowed.
            progress: called with the bytes written so far, every few MB.
            sha256: what the hash must come out as, where the client said.

        Raises:
            ServeError: too large, or the hash is another one. Nothing is left on disk then, nor when the client
                goes away.
            WriteError: the disk is full.
        """
        return await self._kept(lambda file: self._write(file, chunks, limit, progress), sha256)

    async def take(
        self, body: Body, *, seconds: float, progress: Callable[[int], None], sha256: str | None = None
    ) -> Upload:
        """Have a body written to a new file by the process that receives uploads.

        Args:
            body: what was taken over, once ``receiver`` is ready.
            seconds: time for all of it.
            progress: called with the bytes written so far, now and then.
            sha256: what the hash must come out as, where the client said.

        Raises:
            ServeError: too late, the client went away, or the hash is another one. Nothing is left on disk then.
            WriteError: the disk is full.
        """
        return await self._kept(lambda file: self.receiver.receive(body, file, seconds, progress), sha256)

    async def _kept(self, write: Callable[[int], Awaitable[Received]], sha256: str | None) -> Upload:
        """A new file, as long as what is written to it is what was announced."""
        received: Received | None = None
        try:
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._directory))
        except OSError as error:
            raise write_error(self._directory, error) from error
        upload: Upload | None = None
        try:
            path = directory / secrets.token_hex(16)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    received = await write(file)
                finally:
                    os.close(file)
            except OSError as error:
                raise write_error(self._directory, error) from error
            if not received.nbytes:
                raise ServeError(400, "the upload is empty")
            if sha256 is not None and sha256.lower() != received.sha256:
                raise ServeError(
                    422, f"the upload's sha256 is {received.sha256}, announced was {sha256[:64]}", hint="Send it again"
                )
            upload = Upload(path, received.sha256, received.nbytes, received.release)
            return upload
        finally:
            if upload is None:
                shutil.rmtree(directory, ignore_errors=True)
                if received is not None:
                    received.release()

    async def _write(
        self, file: int, chunks: AsyncGenerator[Buffer, None], limit: int, progress: Callable[[int], None]
    ) -> Received:
        digest = hashlib.sha256()
        total, held = 0, bytearray()

        def flush(block: Buffer) -> None:
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[os.write(file, view) :]

        async def write(block: Buffer) -> None:
            await _completed(asyncio.get_running_loop().run_in_executor(self._threads, flush, block))
            progress(total)

        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                total += len(chunk)
                if total > limit:
                    raise ServeError(413, f"the upload is larger than the {limit} bytes allowed")
                held += chunk
                if len(held) >= _BLOCK:
                    block, held = held, bytearray()
                    await write(block)
        if held:
            await write(held)
        return Received(digest.hexdigest(), total)


async def _completed(work: asyncio.Future[None]) -> None:
    """Wait for a thread's work, even if cancelled: it uses a buffer and a file that are about to go."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
