"""The compiled ``moves.c``: found, checked to be of this version, and called without the interpreter's lock."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RANK = 6
LOOK, ROWS, TILES, WALK, GATHER = range(5)
WIDE = 1024
"""Elements in a row that native code looks at while it copies it, at least."""

NOWHERE = 0
"""The slot whose address is always 0."""

MOVE = np.dtype(
    [(name, np.int64) for name in ("kind", "itemsize", "target", "source", "factor", "flag")]
    + [(name, np.int64) for name in ("target_offset", "source_offset", "factor_offset", "to", "take", "lines")]
    + [(name, np.int64, (RANK,)) for name in ("dims", "target_strides", "source_strides", "factor_strides")]
)
"""One move: see ``moves.c`` for the fields."""

BATCH = ("moves", "units", "addresses", "count", "stream", "next", "done")
"""One batch, numbers of 8 bytes all: see ``moves.c`` for the fields."""

HELPERS = ("call", "batch", "inside", "closed")
"""The table of those who help with batches, likewise: see ``helpers.h``."""

FILE = "_moves.so"
OFF = "ONNX_REFIT_PORTABLE"
"""Environment variable: anything but nothing or 0 means to do without the native code."""

_VERSION = 7
_EXPECTED = _VERSION * 1_000_000 + MOVE.itemsize * 1000 + 8 * len(BATCH)


@dataclass(frozen=True)
class Library:
    """What was compiled.

    Attributes:
        work: does the units of the batch at this address that nobody has begun; returns when none is left to begin.
            Any number of threads may work on one batch; it does not hold the interpreter's lock.
        pace: the same for about so many nanoseconds (the last argument), sleeping so many times as long as it works.
        share: does one of them, and more for about so many nanoseconds; how many it took.
        left: how many are not finished; what the others wrote can be read.
        stop: lets nobody begin one any more, and waits until those that were begun are finished.
        helped: whether others can help on this system: the next four are explained in ``helpers.h`` and used by
            whoever has the threads.
        help: waits for batches to help with.
        rouse: has those who help awake.
        together: the same as ``work`` with their help.
        dismiss: lets them go.
        call: asks arrays what they are; like the next three it holds the lock, so that none of them changes meanwhile.
            All four are explained in ``arrays.h`` and used by ``roll``.
        join: copies the elements of some of them, float32 all, together; whether one is not finite.
        sample: reads a few elements of some of them.
        see: all three at once.
    """

    work: Callable[[int], None]
    pace: Callable[[int, int, int], None]
    share: Callable[[int, int], int]
    left: Callable[[int], int]
    stop: Callable[[int], None]
    helped: bool
    help: Callable[[int], None]
    rouse: Callable[[int], None]
    together: Callable[[int, int], None]
    dismiss: Callable[[int], None]
    call: Callable[..., int]
    join: Callable[..., int]
    sample: Callable[..., None]
    see: Callable[[int, int, int, int, int], int]


@dataclass(frozen=True)
class Absent:
    """Why there is none."""

    reason: str


@functools.cache
def load(folder: Path = Path(__file__).parent) -> Library | Absent:
    """The library beside this module, or why it is not used."""
    if os.environ.get(OFF, "0") not in {"", "0"}:
        return Absent(f"the environment variable {OFF} says to do without")
    path = folder / FILE
    if not path.exists():
        return Absent("no C compiler was found when the package was installed")
    try:
        library = ctypes.CDLL(str(path))
        version = library.onnx_refit_version
        work, pace, share = library.onnx_refit_work, library.onnx_refit_pace, library.onnx_refit_share
        left, stop = library.onnx_refit_left, library.onnx_refit_stop
        helped, lend, rouse = library.onnx_refit_helped, library.onnx_refit_help, library.onnx_refit_rouse
        together, dismiss = library.onnx_refit_together, library.onnx_refit_dismiss
        held = ctypes.PyDLL(str(path))
        call, join, sample = held.onnx_refit_call, held.onnx_refit_join, held.onnx_refit_sample
        see = held.onnx_refit_see
    except (OSError, AttributeError) as error:
        return Absent(f"{path.name} cannot be used: {error}")
    version.restype = ctypes.c_int64
    version.argtypes = ()
    if version() != _EXPECTED:
        return Absent(f"{path.name} was compiled from another version of the source: install the package again")
    for function, result, arguments in (
        (work, None, "a"),
        (pace, None, "aii"),
        (share, ctypes.c_int64, "ai"),
        (left, ctypes.c_int64, "a"),
        (stop, None, "a"),
        (helped, ctypes.c_int64, ""),
        (lend, None, "a"),
        (rouse, None, "a"),
        (together, None, "aa"),
        (dismiss, None, "a"),
        (call, ctypes.c_int64, "aiaaaa"),
        (join, ctypes.c_int64, "aaaia"),
        (sample, None, "aaaaaia"),
        (see, ctypes.c_int64, "aaaaa"),
    ):
        function.restype = result
        function.argtypes = tuple(ctypes.c_int64 if kind == "i" else ctypes.c_void_p for kind in arguments)
    helps = bool(helped()), lend, rouse, together, dismiss
    return Library(work, pace, share, left, stop, *helps, call, join, sample, see)
