"""Threads that give way to inference."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

# Steps of "nice" below the rest of the process. At 10 such a thread gets a tenth of a core that inference wants too,
# and what it holds meanwhile (Python's lock, for microseconds) it still gives back soon.
_STEPS = 10


def give_way() -> None:
    """Lower the priority of the calling thread (and of those it starts), where the system has such a thing."""
    if not sys.platform.startswith("linux"):  # elsewhere the priority is the whole process's
        return
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _STEPS))


def background_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads that give way to inference."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name, initializer=give_way)
