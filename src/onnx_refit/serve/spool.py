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
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from onnx_refit.errors import StoreLockedError
from onnx_refit.files import write_error
from onnx_refit.serve.body import Buffer
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.priority import background_pool

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
    """

    path: Path
    sha256: str
    nbytes: int

    def remove(self) -> None:
        """Delete it; what has it mapped keeps its contents."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


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
        try:
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._directory))
        except OSError as error:
            raise write_error(self._directory, error) from error
        upload: Upload | None = None
        try:
            received = await self._write(directory / secrets.token_hex(16), chunks, limit, progress)
            if sha256 is not None and sha256.lower() != received.sha256:
                raise ServeError(
                    422, f"the upload's sha256 is {received.sha256}, announced was {sha256[:64]}", hint="Send it again"
                )
            upload = received
            return upload
        finally:
            if upload is None:
                shutil.rmtree(directory, ignore_errors=True)

    async def _write(
        self, path: Path, chunks: AsyncGenerator[Buffer, None], limit: int, progress: Callable[[int], None]
    ) -> Upload:
        digest = hashlib.sha256()
        total, held = 0, bytearray()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

        def flush(block: Buffer) -> None:
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[os.write(descriptor, view) :]

        async def write(block: Buffer) -> None:
            await _completed(asyncio.get_running_loop().run_in_executor(self._threads, flush, block))
            progress(total)

        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    total += len(chunk)
                    if total > limit:
                        raise ServeError(413, f"the upload is larger than the {limit} bytes allowed")
                    large = len(chunk) >= _BLOCK
                    if not large:
                        held += chunk
                    if held and (large or len(held) >= _BLOCK):
                        block, held = held, bytearray()
                        await write(block)
                    if large:
                        await write(chunk)
            if held:
                await write(held)
        except OSError as error:
            raise write_error(path.parent.parent, error) from error
        finally:
            os.close(descriptor)
        if not total:
            raise ServeError(400, "the upload is empty")
        return Upload(path, digest.hexdigest(), total)


async def _completed(work: asyncio.Future[None]) -> None:
    """Wait for a thread's work, even if cancelled: it uses a buffer and a file that are about to go."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
