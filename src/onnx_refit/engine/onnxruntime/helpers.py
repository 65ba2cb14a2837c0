"""Threads that help with batches of moves, waiting in native code."""

from __future__ import annotations

import threading
import weakref
from array import array

from onnx_refit.moves.library import HELPERS, Library
from onnx_refit.threads import step_back


class Helpers:
    """Threads that wait for batches without the interpreter's lock: through it, waking one takes as long as a refit.

    One batch at a time. Close it, or drop it; nothing happens before the first call.

    Args:
        library: the native code.
        count: how many threads.
    """

    def __init__(self, library: Library, count: int) -> None:
        self._library, self._count = library, count
        self._table = array("q", bytes(8 * len(HELPERS)))
        self._threads: list[threading.Thread] = []
        self._dismiss = weakref.finalize(self, _dismiss, library, self._table)
        self._dismiss.atexit = False  # a process that ends takes them along where they wait

    def rouse(self) -> None:
        """Have them awake for what comes within some tenths of a millisecond."""
        self._begin()
        self._library.rouse(self._table.buffer_info()[0])

    def _begin(self) -> None:
        if not self._threads and self._dismiss.alive:
            for _ in range(self._count):
                thread = threading.Thread(
                    target=_help, args=(self._library, self._table), name="onnx-refit-helper", daemon=True
                )
                thread.start()
                self._threads.append(thread)

    def work(self, batch: int) -> None:
        """Do the batch at this address with them; none of them works on it any more when this returns."""
        self._begin()
        self._library.together(self._table.buffer_info()[0], batch)

    def close(self) -> None:
        """End the threads; batches are done without them from now on."""
        self._dismiss()
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def _help(library: Library, table: array[int]) -> None:
    # Requests go first: with as many threads as cores they would wait for a refit's.
    step_back()
    library.help(table.buffer_info()[0])


def _dismiss(library: Library, table: array[int]) -> None:
    library.dismiss(table.buffer_info()[0])
