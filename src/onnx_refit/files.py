"""Writing files so that a reader sees the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from onnx_refit.errors import OnnxRefitError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space or choose another place"),
    errno.EROFS: ("the file system is read-only", "Choose a place that can be written"),
    errno.EACCES: ("permission denied", "Choose a place that can be written, or change its permissions"),
    errno.EPERM: ("permission denied", "Choose a place that can be written, or change its permissions"),
    errno.ENOENT: ("no such directory", "Create it first, or choose another place"),
    errno.ENOTDIR: ("part of the path is a file, not a directory", "Choose another place"),
    errno.EISDIR: ("it is a directory", "Name a file in it"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one"),
}


def _read_umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# Read once: the only way to read it is to set it, which no thread should see happen later.
_UMASK = _read_umask()


class WriteError(OnnxRefitError):
    """A file could not be written; what stood there before still stands."""


class ReadError(OnnxRefitError):
    """A file could not be read."""


def write_error(path: Path, error: OSError) -> WriteError:
    """Say an operating-system error on writing in words."""
    reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), "Check the path"))
    return WriteError(f"cannot be written: {reason}", where=path, hint=hint)


def read_error(path: Path, error: OSError) -> ReadError:
    """Say an operating-system error on reading in words."""
    if isinstance(error, FileNotFoundError):
        return ReadError("no such file", where=path, hint="Check the path")
    if isinstance(error, IsADirectoryError):
        return ReadError("it is a directory, not a file", where=path, hint="Name a file in it")
    return ReadError(f"cannot be read: {error.strerror or error}", where=path)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable (a no-op where the platform cannot sync directories)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; on leaving the block it is synced and renamed to ``path``.

    If the block raises, or the disk is full, the temporary file is removed and what stood at ``path`` is untouched.
    An error of the block about another file, one that it reads, say, is left as it is.

    Raises:
        WriteError: the operating system refused (full disk, read-only place, missing directory, ...).
    """
    target = Path(path)
    temporary: Path | None = None
    foreign: OSError | None = None
    try:
        # A link is written through, as open() would; so is what is no file (a pipe, /dev/null).
        target = target.resolve() if target.is_symlink() else target
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():
            with target.open("wb") as stream:
                yield stream
            return
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            try:
                yield file
            except OSError as error:
                foreign = error if error.filename not in (None, name) else None
                raise
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file readable by its owner alone; give it what the old one had, or open() would give.
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_UMASK)
        temporary.replace(target)
        temporary = None
        sync_directory(target.parent)
    except OSError as error:
        if error is foreign:
            raise
        raise write_error(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file atomically; WriteError as for ``atomic_write``."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole UTF-8 text file atomically; WriteError as for ``atomic_write``."""
    write_bytes(path, text.encode("utf-8"))
