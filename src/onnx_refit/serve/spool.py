"""Uploads: streamed to disk under a name of the server's, counted, bounded, and hashed on the way."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from onnx_refit.errors import StoreLockedError
from onnx_refit.files import write_error
from onnx_refit.serve.errors import ServeError

_BLOCK = 4 << 20
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

    def close(self) -> None:
        """Give the directory free."""
        self._lock.close()
        if self._temporary:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def receive(
        self, chunks: AsyncIterator[bytes], *, limit: int, progress: Callable[[int], None], sha256: str | None = None
    ) -> Upload:
        """Write chunks to a new file.

        Args:
            chunks: the bytes.
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
        self, path: Path, chunks: AsyncIterator[bytes], limit: int, progress: Callable[[int], None]
    ) -> Upload:
        digest = hashlib.sha256()
        total, held = 0, bytearray()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

        def flush(block: bytes) -> None:
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[os.write(descriptor, view) :]

        try:
            async for chunk in chunks:
                total += len(chunk)
                if total > limit:
                    raise ServeError(413, f"the upload is larger than the {limit} bytes allowed")
                held += chunk
                if len(held) >= _BLOCK:
                    block, held = bytes(held), bytearray()
                    await asyncio.to_thread(flush, block)
                    progress(total)
            if held:
                await asyncio.to_thread(flush, bytes(held))
        except OSError as error:
            raise write_error(path.parent.parent, error) from error
        finally:
            os.close(descriptor)
        if not total:
            raise ServeError(400, "the upload is empty")
        progress(total)
        return Upload(path, digest.hexdigest(), total)
