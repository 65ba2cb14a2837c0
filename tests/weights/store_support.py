"""Weights by version, their check, and disks that fail, kill the process or lose power at a chosen step."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from onnx_refit.weights.source import read_all
from onnx_refit.weights.store import Store
from onnx_refit.weights.store.disk import Disk


def arrays(value: float) -> dict[str, Any]:
    return {
        "a": np.full((3, 4), value, np.float32),
        "b": np.full(5, value, np.float16),
        "fixed": np.arange(7),
        "packed": np.full(3, value, ml_dtypes.int4),
        "bf": np.full((), value, ml_dtypes.bfloat16),
        "none": np.zeros((0, 2), np.float32),
    }


def check(store: Store, number: int, value: float) -> None:
    store.verify(number)
    got = dict(read_all(store.load(number)))
    expected = arrays(value)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes()


class Killed(BaseException):
    """The process is gone: nothing it would still do happens."""


class QuickDisk(Disk):
    """A disk without the waiting: what was synced is bookkeeping of the tests."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass

    def truncate(self, path: Path, length: int) -> None:
        os.truncate(path, length)


class FaultyDisk(QuickDisk):
    """Fails at one step. Keeps track of what a power cut would take away.

    Args:
        at: the step, counted from 0; none if negative.
        kill: the process dies there, instead of being told of an error.
    """

    def __init__(self, at: int = -1, *, kill: bool = False) -> None:
        self.at, self.kill, self.steps, self.dead = at, kill, 0, False
        self.open: dict[int, Path] = {}
        self.unsynced: dict[Path, int] = {}  # length that survives
        self.unnamed: list[tuple[Path, Path | None]] = []  # new names that may vanish, with what they were before

    def _step(self) -> None:
        if self.dead:
            raise Killed
        self.steps += 1
        if self.steps - 1 == self.at:
            if self.kill:
                self.dead = True
                raise Killed
            raise OSError(errno.ENOSPC, "No space left on device")

    def create(self, path: Path) -> int:
        self._step()
        self.unnamed.append((path, None))
        descriptor = super().create(path)
        self.open[descriptor], self.unsynced[path] = path, 0
        return descriptor

    def open_append(self, path: Path) -> int:
        self._step()
        if not path.exists():
            self.unnamed.append((path, None))
        descriptor = super().open_append(path)
        self.open[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        path = self.open[descriptor]
        self.unsynced.setdefault(path, path.stat().st_size)
        try:
            self._step()
        except BaseException:
            half = memoryview(data).cast("B")
            os.write(descriptor, half[: len(half) // 2])  # a short write
            raise
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._step()
        super().sync(descriptor)
        self.unsynced.pop(self.open[descriptor], None)

    def close(self, descriptor: int) -> None:
        self.open.pop(descriptor)
        super().close(descriptor)
        self._step()

    def replace(self, source: Path, target: Path) -> None:
        self._step()
        super().replace(source, target)
        self.unnamed = [entry for entry in self.unnamed if entry[0] != source]
        self.unnamed.append((target, source))
        if source in self.unsynced:
            self.unsynced[target] = self.unsynced.pop(source)

    def sync_directory(self, path: Path) -> None:
        self._step()
        super().sync_directory(path)
        self.unnamed = [entry for entry in self.unnamed if entry[0].parent != path]

    def truncate(self, path: Path, length: int) -> None:
        self._step()
        super().truncate(path, length)
        self.unsynced.pop(path, None)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)

    def cut_power(self, generator: random.Random) -> None:
        """Take away what was not synced: none, half or all of it, file by file."""
        for path, length in self.unsynced.items():
            if path.exists():
                lost = path.stat().st_size - length
                os.truncate(path, length + max(0, generator.choice([0, lost // 2, lost])))
        for path, before in reversed(self.unnamed):
            if path.exists() and generator.random() < 0.5:
                if before is None:
                    path.unlink()
                else:
                    path.replace(before)


@contextlib.contextmanager
def opened(path: Path, disk: FaultyDisk) -> Iterator[Store]:
    store = Store.open(path, disk=disk)
    try:
        yield store
    finally:
        for descriptor in list(disk.open):
            os.close(descriptor)
        store.close()
