"""Threads that tidy up some time after the last use, turn by turn in the test's own thread."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest


class _EnoughError(Exception):
    pass


class _Looks(threading.Event):
    """Waiting takes no time, and ends the janitor's work after as many turns as it is given."""

    turns = 0

    def wait(self, timeout: float | None = None) -> bool:
        if not self.turns:
            raise _EnoughError
        self.turns -= 1
        return self.is_set()


def by_hand(owner: Any, clean: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What makes an owner's janitor look once, without sleeping; it does not look by itself.

    Args:
        owner: what it tidies up, not used yet.
        clean: its work.
        monkeypatch: puts everything back.
    """
    here, sleep = threading.current_thread(), time.sleep

    def no_sleep(seconds: float) -> None:
        if threading.current_thread() is not here:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", no_sleep)
    owner._janitor = threading.Thread()  # never started
    owner._used = used = _Looks()

    def look() -> None:
        used.turns = 1
        with contextlib.suppress(_EnoughError):
            clean(weakref.ref(owner), used)

    return look
