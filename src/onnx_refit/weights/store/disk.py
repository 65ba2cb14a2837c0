"""Every way in which the store touches the disk, in one place, so that tests can make each of them fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from onnx_refit.errors import StoreError, StoreLockedError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "part of the path is a file, not a directory",
    errno.EEXIST: "there is a file where the store needs a directory",
    errno.EISDIR: "there is a directory where the store needs a file",
}


def store_error(path: Path, error: OSError) -> StoreError:
    """Say an operating-system error on the store in words."""
    return StoreError(_REASONS.get(error.errno or 0, error.strerror or str(error)), where=path)


class Disk:
    """The real disk. All methods raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Make a directory and its parents, unless it is there."""
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """Open a new file for writing; whatever had the name is gone."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def open_append(self, path: Path) -> int:
        """Open a file for writing at its end, making it if need be."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        """Write all of the data."""
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]

    def sync(self, descriptor: int) -> None:
        """Make what was written durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Rename a file over another."""
        source.replace(target)

    def sync_directory(self, path: Path) -> None:
        """Make renames and new names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def truncate(self, path: Path, length: int) -> None:
        """Cut a file to a length, durably."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, length)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file, unless it is gone."""
        path.unlink(missing_ok=True)


def write_file(disk: Disk, path: Path, chunks: list[bytes | memoryview]) -> None:
    """Write a file whole and durably under a temporary name and rename it; OSError leaves nothing behind."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = disk.create(temporary)
    try:
        try:
            for chunk in chunks:
                disk.write(descriptor, chunk)
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        disk.replace(temporary, path)
        disk.sync_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            disk.remove(temporary)
        raise


class Lock:
    """The right to write to a store, held by one process (and by one store object in it).

    Args:
        path: the lock file.

    Raises:
        StoreLockedError: somebody else holds it.
        StoreError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise store_error(path, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 20, 0).decode(errors="replace").strip()
            self.release()
            own = holder == str(os.getpid())
            raise StoreLockedError(
                f"this very process ({holder}) has the store open"
                if own
                else f"process {holder or 'unknown'} is writing to this store",
                where=path.parent,
                hint="Close the engine that has it, or use another store"
                if own
                else "Wait until it ends, or use another store",
            ) from error
        except OSError as error:
            self.release()
            raise store_error(path, error) from error

    def release(self) -> None:
        """Give the lock back; the operating system does so when the process ends, however it ends."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
