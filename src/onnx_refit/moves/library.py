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

BATCH = ("moves", "units", "addresses", "count", "stream", "pause", "next")
"""One batch, numbers of 8 bytes all: see ``moves.c`` for the fields."""

FILE = "_moves.so"
OFF = "ONNX_REFIT_PORTABLE"
"""Environment variable: anything but nothing or 0 means to do without the native code."""

_VERSION = 2
_EXPECTED = _VERSION * 1_000_000 + MOVE.itemsize * 1000 + 8 * len(BATCH)


@dataclass(frozen=True)
class Library:
    """What was compiled.

    Attributes:
        work: does the units of the batch at this address that nobody has begun; returns when none is left to begin.
            Any number of threads may work on one batch; it does not hold the interpreter's lock.
    """

    work: Callable[[int], None]


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
        work = library.onnx_refit_work
    except (OSError, AttributeError) as error:
        return Absent(f"{path.name} cannot be used: {error}")
    version.restype = ctypes.c_int64
    version.argtypes = ()
    if version() != _EXPECTED:
        return Absent(f"{path.name} was compiled from another version of the source: install the package again")
    work.restype = None
    work.argtypes = (ctypes.c_void_p,)
    return Library(work)
