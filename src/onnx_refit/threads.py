"""Background work that stays in the background."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

_NICE = 10


def step_back() -> None:
    """Let other threads go first from now on: call it in a thread of one's own.

    Linux schedules threads one by one, and a thread may always lower its own priority (never raise it again, so this
    is for threads that do nothing else). Elsewhere it does nothing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
