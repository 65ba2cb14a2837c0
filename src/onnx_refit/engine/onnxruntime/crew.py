"""Tasks that several threads do together, and the certainty that none of them still does one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

Task = tuple[int, Callable[..., object], tuple[Any, ...]]
"""Elements, what to call, with what."""


class Crew:
    """Does tasks, each once, with the threads that call ``work`` and ``help``.

    Futures would not do to wait for the helpers: an interrupt between a thread pool's taking one and the caller's
    learning of it leaves a helper that nobody knows.

    Args:
        tasks: the tasks, in the order in which to begin them.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._waiting = iter(list(tasks))  # next() on a list's iterator is atomic: each task is done once
        self._changed = threading.Condition()
        self._busy = 0
        self._over = False
        self._error: BaseException | None = None

    def work(self) -> None:
        """Do tasks until none is left to begin."""
        for _, call, arguments in self._waiting:
            call(*arguments)

    def help(self) -> None:
        """The same, in another thread; does nothing after ``finish``."""
        with self._changed:
            if self._over:
                return
            self._busy += 1
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001  ``check`` raises it
            self._error = error
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def finish(self) -> None:
        """Begin no further task and wait for those in hand: none is being done once this returns, or raises."""
        interrupt: BaseException | None = None
        with self._changed:
            self._over = True
            for _ in self._waiting:
                pass
            while self._busy:
                try:
                    self._changed.wait()
                except BaseException as error:  # noqa: BLE001  raised below: nobody may free what is being written
                    interrupt = error
        if interrupt is not None:
            raise interrupt

    def check(self) -> None:
        """Raise what a helper raised."""
        if self._error is not None:
            raise self._error
