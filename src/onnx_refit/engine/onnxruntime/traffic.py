"""Requests and refits of one engine beside each other: who gives way, and by how much.

Where requests need every core, a refit's thread that works beside them takes a core from a thread that a request waits
for. So it sleeps, and the threads that bring requests do its native work: a little after each request, while the cores
are theirs anyway. Where a core is left, the refit's thread takes that, but rests between units of work: moving weights
at full speed takes the memory's bandwidth from requests, which read weights too.
"""

from __future__ import annotations

import threading
import time

from onnx_refit.engine.onnxruntime.batch import Ready
from onnx_refit.moves.library import Library

_LEAST, _MOST = 0.05, 0.10  # of the time of a request, to work for a refit after it
_SHARED_SECONDS = 0.035  # within which requests are to have done a refit's work, as far as these shares allow
_SHORTEST, _LONGEST = 1, 3  # times as long as a unit took to rest after it, where a core is left
_RESTED_SECONDS = 0.03  # within which a refit's work is to be done then, likewise
_CROWDED = 9  # the same where none is left, and requests are too long to wait for their end
_SLICE = 2_000_000  # ns of work, after which to see what requests do now
_RECENT = 1e-3  # seconds since the last request in which the next one is expected
_LOOK = 10e-3  # seconds between two looks at what requests have done: each may take a core from one of them
_PATIENCE = 3.0  # times what a request takes to wait for one to end
_UNIT = 40e-6  # seconds that a unit takes, before any was timed
_FEW = 8  # units; the time of fewer says little of one


class Shared:
    """A batch that those work on who bring requests. Thread-safe: a race costs a little credit, and no work.

    Attributes:
        done: set when nothing is left to do.
        helped: how often somebody did some of it.

    Args:
        library: the native code.
        ready: the batch.
        share: of the time of a request, to work after it.
        unit: seconds that a unit of work takes.
    """

    def __init__(self, library: Library, ready: Ready, share: float, unit: float) -> None:
        self._library, self._ready, self._share, self._unit = library, ready, share, unit
        self._credit = 0.0
        self.done = threading.Event()
        self.helped = 0

    def help(self, took: float) -> None:
        """Work for a share of the seconds that a request took, as soon as these shares make up for a unit."""
        earned = took * self._share
        credit = min(self._credit, self._unit) + earned
        if credit < self._unit:
            self._credit = credit
            return
        spent = self._library.share(self._ready.address, int(credit * 1e9))
        self._credit = credit - spent * 1e-9
        self.helped += 1
        if not self._library.left(self._ready.address):
            self.done.set()


class Traffic:
    """The requests of one engine, and the refit that goes on beside them. Thread-safe, one refit at a time.

    Args:
        threads: that a request takes.
        cores: that there are.
    """

    def __init__(self, threads: int, cores: int) -> None:
        self._threads, self._cores = threads, cores
        self._flying: dict[object, float] = {}  # request -> when it began; dicts grow and shrink atomically
        self._last = -_RECENT
        self._bringer = 0
        self._usual = 0.0
        self._unit = _UNIT
        self._shared: Shared | None = None

    def begin(self, request: object) -> None:
        """A request comes; ``done`` or ``end`` must follow, or both."""
        self._flying[request] = time.perf_counter()

    def done(self, request: object) -> None:
        """It has its answer: do a little for the refit that waits, if there is one; then the request goes."""
        shared, now = self._shared, time.perf_counter()
        took = now - self._flying[request]
        self._usual += (took - self._usual) / 8
        if shared is not None:
            shared.help(took)
            now = time.perf_counter()
        self._flying.pop(request, None)
        self._last, self._bringer = now, threading.get_ident()

    def end(self, request: object) -> None:
        """A request goes without an answer, if it has not gone."""
        self._flying.pop(request, None)
        self._last, self._bringer = time.perf_counter(), threading.get_ident()

    @property
    def flows(self) -> bool:
        """Whether a request is in flight, or another thread is likely to bring the next one."""
        if self._flying:
            return True
        return time.perf_counter() - self._last < _RECENT and self._bringer != threading.get_ident()

    @property
    def crowded(self) -> bool:
        """Whether requests, while they come, leave no core."""
        return max(1, len(self._flying)) * self._threads >= self._cores

    def carry(self, library: Library, ready: Ready) -> None:
        """Have a batch done beside requests: by those that bring them, or slowly; at full speed once none comes.

        However this ends, nobody works on the batch any more.
        """
        address = ready.address
        likely = max(ready.units * self._unit, 1e-9)
        rest = int(min(max(_RESTED_SECONDS / likely - 1, _SHORTEST), _LONGEST))
        shared = Shared(library, ready, min(max(likely / _SHARED_SECONDS, _LEAST), _MOST), self._unit)
        helped, since = 0, time.perf_counter()
        try:
            while left := library.left(address):
                crowded = self.crowded
                self._shared = shared if crowded else None
                if not self.flows:
                    spent, done = library.share(address, _SLICE), left - library.left(address)
                    if done >= _FEW:
                        self._unit += (spent * 1e-9 / done - self._unit) / 8
                elif not crowded:
                    library.pace(address, rest, _SLICE)
                elif shared.helped == helped and time.perf_counter() - since > max(_LOOK, _PATIENCE * self._usual):
                    library.pace(address, _CROWDED, _SLICE)
                elif not shared.done.wait(_LOOK) and shared.helped > helped:
                    helped, since = shared.helped, time.perf_counter()
        finally:
            self._shared = None
            library.stop(address)
