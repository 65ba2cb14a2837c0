"""Uploads that are received past the event loop, by a process that gives way to inference.

Through the event loop every piece of a body is copied half a dozen times, and each pause and resumption of reading
takes its turn between two inferences: 14 ms of the loop for 8 MB. Here the HTTP protocol gives up the socket once the
headers are parsed (``direct``), and the server only learns how far another process has come (``receiver_process``).
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from onnx_refit.serve import receiver_process
from onnx_refit.serve.direct import Body, drain, readable
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.logs import log
from onnx_refit.serve.priority import give_way
from onnx_refit.serve.receiver_process import DONE, FAILED, GONE, JOB, REPORT

_ENDED = "the process that receives uploads ended"
_AGAIN = "Send it again"


@dataclass(frozen=True)
class Received:
    """A body that lies in its file.

    Attributes:
        sha256: of its bytes, in hex.
        nbytes: its size.
        release: to be called once the file was deleted: what the system holds of it is freed elsewhere then.
    """

    sha256: str
    nbytes: int
    release: Callable[[], None] = lambda: None


class Receiver:
    """The process, and what it is asked to do. Used from the event loop's thread; made and closed in any."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._start()

    @property
    def ready(self) -> bool:
        """Whether it takes uploads; where no process can be started, they have to come through the event loop."""
        if self._process is not None and self._process.poll() is not None:
            self._start()
        return self._process is not None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            # No site-packages, so that it is there in no time, and nothing of the environment changes what it does.
            command = [sys.executable, "-I", "-S", receiver_process.__file__, str(theirs.fileno())]
            quiet = subprocess.DEVNULL
            try:
                self._process = subprocess.Popen(
                    command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[theirs.fileno()]
                )
            except OSError as error:
                ours.close()
                log("uploads come through the event loop: no process can be started", error=str(error))
                return
        give_way(self._process.pid)
        self._control = ours

    def close(self) -> None:
        """End the process; uploads that are under way fail."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    async def receive(self, body: Body, file: int, seconds: float, progress: Callable[[int], None]) -> Received:
        """Write a body to a file.

        Args:
            body: what was taken over; its socket is closed.
            file: descriptor of a new file, for reading and writing.
            seconds: time for all of it.
            progress: called with the bytes written so far, now and then.

        Raises:
            ServeError: 408 if it is not complete in time, 400 if the client went away, 503 if the process ended.
            OSError: the file cannot be written.
        """
        total = len(body.first) + body.remaining
        done = 0

        def further(so_far: int) -> None:
            nonlocal done
            done = so_far
            progress(so_far)

        with body.socket:
            try:
                # What came with the headers: little enough to be written here.
                os.pwrite(file, body.first, 0)
                done = len(body.first)
                reports = self._post(body, file)
                try:
                    async with asyncio.timeout(seconds):
                        sha256 = await _followed(reports, further)
                except BaseException:
                    os.close(reports)  # so it learns that nobody wants the upload any more
                    raise
                return Received(sha256, total, lambda: os.close(reports))
            except ConnectionResetError as error:
                raise ServeError(400, "the client went away") from error
            except TimeoutError as error:
                await drain(body.socket, total - done)
                raise ServeError(408, f"the body was not complete after {seconds:g} s") from error
            except (OSError, ServeError):
                await drain(body.socket, total - done)
                raise

    def _post(self, body: Body, file: int) -> int:
        """Hand a job over; the descriptor to read reports from, to be closed by the caller."""
        ours, theirs = os.pipe()
        try:
            if not self.ready or self._control is None:
                raise ServeError(503, _ENDED, hint=_AGAIN)
            job = JOB.pack(len(body.first), body.remaining)
            socket.send_fds(self._control, [job], [body.socket.fileno(), file, theirs])
        except BrokenPipeError as error:
            os.close(ours)
            raise ServeError(503, _ENDED, hint=_AGAIN) from error
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours


async def _followed(reports: int, progress: Callable[[int], None]) -> str:
    """The sha256, once all of it is there.

    Raises:
        ConnectionResetError: the client went away.
        OSError: the file cannot be written.
        ServeError: the process ended.
    """
    while True:
        await readable(reports)
        report = os.read(reports, REPORT.size)  # written in one piece, so read in one piece
        if not report:
            raise ServeError(503, _ENDED, hint=_AGAIN)
        what, errno, done, sha256 = REPORT.unpack(report)
        if what == GONE:
            raise ConnectionResetError
        progress(done)
        if what == FAILED:
            raise OSError(errno, os.strerror(errno))
        if what == DONE:
            return str(sha256.hex())
