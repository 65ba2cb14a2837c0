"""The process that receives uploads: reads them from their sockets, hashes them and writes them to files.

Started by ``receiver`` as a script, by an interpreter without site-packages: only the standard library may be imported
here. It is a process and not a thread because it must give way to inference. A thread that does shares Python's lock
with it, and one that was put aside while it held the lock holds up everybody.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import signal
import socket
import struct
import sys
import threading
import time

JOB = struct.Struct("=QQ")
"""Sent with (connection, file, reports): bytes that are in the file already, bytes that are still to come."""

REPORT = struct.Struct("=BiQ32s")
"""Comes back over the pipe ``reports``: what (below), errno, bytes in the file, sha256 of the whole."""

PROGRESS, DONE, GONE, FAILED = range(4)

# Small enough to stay in a core's cache between being received, hashed and written, and to be put aside soon: a
# kernel that does not interrupt itself finishes a call first.
_PIECE = 128 << 10
_PATIENCE_MS = 20
_PROGRESS_SECONDS = 0.1


def main(control: socket.socket) -> None:
    """Take jobs until the server is gone.

    Args:
        control: where they come from, a Unix stream socket.
    """
    # A terminal's interrupt goes to the whole group, but uploads end when the server says so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(control, JOB.size, 3)
        if len(message) < JOB.size or len(files) < 3:
            return
        threading.Thread(target=_Job(message, files).work, daemon=True).start()


class _Job:
    """One upload."""

    def __init__(self, message: bytes, files: list[int]) -> None:
        self._have, self._left = JOB.unpack(message)
        self._connection = socket.socket(fileno=files[0])
        self._file, self._reports = files[1:]
        self._digest = hashlib.sha256()
        self._view = memoryview(bytearray(_PIECE))
        self._told = time.monotonic()
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)
        self._poll.register(self._reports, 0)  # the server closes its end when it does not want the upload any more

    def work(self) -> None:
        """Receive it, then keep the file open until the server has no use for it.

        The last one who closes a deleted file frees what the system holds of it in memory, which takes a while.
        """
        try:
            self._receive()
            self._tell(DONE, sha256=self._digest.digest())
            self._connection.close()
            unwanted = select.poll()
            unwanted.register(self._reports, 0)
            unwanted.poll()
        except BrokenPipeError:
            pass  # nobody waits for it any more
        except OSError as error:
            with contextlib.suppress(BrokenPipeError):
                self._tell(GONE if isinstance(error, ConnectionError) else FAILED, error.errno or 0)
        finally:
            self._connection.close()
            os.close(self._file)
            os.close(self._reports)

    def _receive(self) -> None:
        # What came with the headers: no more than the HTTP protocol reads at once.
        first = os.pread(self._file, self._have, 0)
        if len(first) < self._have:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._digest.update(first)
        os.lseek(self._file, self._have, os.SEEK_SET)
        while self._left:
            try:
                got = self._connection.recv_into(self._view, min(_PIECE, self._left))
            except BlockingIOError:
                self._wait()
                continue
            if not got:
                raise ConnectionResetError
            piece = self._view[:got]
            self._digest.update(piece)
            while piece:
                piece = piece[os.write(self._file, piece) :]
            self._have += got
            self._left -= got
            if time.monotonic() > self._told + _PROGRESS_SECONDS:
                self._tell(PROGRESS)
                self._told = time.monotonic()

    def _wait(self) -> None:
        """Wait until a piece came, or something that is less; BrokenPipeError if nobody wants it any more."""
        # Woken by every packet, it would run hundreds of times; but the sender may be slow, or wait for a larger
        # window than the socket's memory allows just now.
        for size, patience in ((min(_PIECE, self._left), _PATIENCE_MS), (1, None)):
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
            events = self._poll.poll(patience)
            if any(file == self._reports for file, _ in events):
                raise BrokenPipeError
            if events:
                return

    def _tell(self, what: int, number: int = 0, sha256: bytes = b"") -> None:
        os.write(self._reports, REPORT.pack(what, number, self._have, sha256))


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
