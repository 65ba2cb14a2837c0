"""Threads and processes that give way to inference."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

# Steps of "nice" below the rest of the process. At 10 such a thread gets a tenth of a core that inference wants too,
# and what it holds meanwhile (Python's lock, for microseconds) it still gives back soon. With less, or as SCHED_IDLE,
# it could be put aside for long while it holds the lock, and the event loop with it.
_STEPS = 10
# Linux lets a thread that runs finish its slice (about a millisecond, or what the thread asks for) before one that
# wakes up gets its turn, unless that one's slice is shorter: so who gives way asks for a long one (sched(7), since
# Linux 6.12; before, the wish is ignored).
_SLICE_NANOSECONDS = 100_000_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # struct sched_attr: size, policy, flags, nice, priority, slice, unused


def give_way(task: int | None = None) -> None:
    """Lower the priority of a thread, and of those that it starts, where the system has such a thing.

    Args:
        task: its native id, or that of a process which has only one; None for the calling thread.
    """
    if not sys.platform.startswith("linux"):  # elsewhere the priority is the whole process's
        return
    task = threading.get_native_id() if task is None else task
    with contextlib.suppress(OSError):
        nice = min(19, os.getpriority(os.PRIO_PROCESS, task) + _STEPS)
        os.setpriority(os.PRIO_PROCESS, task, nice)
        # As SCHED_BATCH it never interrupts anybody by waking up.
        os.sched_setscheduler(task, os.SCHED_BATCH, os.sched_param(0))
        number = _SCHED_SETATTR.get(platform.machine())
        if number is not None:
            size = _ATTRIBUTES.size
            attributes = _ATTRIBUTES.pack(size, os.SCHED_BATCH, 0, nice, 0, _SLICE_NANOSECONDS, 0, 0)
            ctypes.CDLL(None).syscall(number, task, attributes, 0)  # if it is refused, the rest still holds


def background_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads that give way to inference."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name, initializer=give_way)
