"""The store holds what was committed, whole, whatever fails and whenever it is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_refit.errors import StoreError, StoreLockedError, VersionError
from onnx_refit.weights.fingerprint import fingerprint
from onnx_refit.weights.open import open_weights
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


def test_commit_load_and_reopen(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s") as store:
        assert store.current() is None
        first = store.commit(arrays(1), None, {"source": "epoch 1"})
        second = store.commit({"a": arrays(2)["a"]}, first.number)
        assert (first.number, second.number, second.parent) == (1, 2, 1)
        assert first.fingerprint == fingerprint(open_weights(arrays(1))).value
        assert store.fingerprint(1).value == first.fingerprint != second.fingerprint
    with pytest.raises(StoreError, match="closed"):
        store.commit(arrays(1))
    with Store.open(tmp_path / "s") as store:
        current = store.current()
        assert current == second
        assert [v.number for v in store.versions()] == [1, 2]
        assert store.versions()[0].metadata == {"source": "epoch 1"}
        check(store, 1, 1)
        mixed = dict(read_all(store.load(2)))
        assert mixed["a"][0, 0] == 2
        assert mixed["b"][0] == 1
        assert not mixed["a"].flags.writeable


def test_versions_share_what_is_equal(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        big = np.random.default_rng(0).random(100_000)
        store.commit({"big": big, "small": np.zeros(1)})
        store.commit({"big": big.copy(), "small": np.ones(1)})
        store.commit({"other": big.copy(), "small": np.zeros(1)})
        assert sum(p.stat().st_size for p in (tmp_path / "packs").iterdir()) < 810_000


def test_rollback_delete_and_collection(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    for value in (1, 2, 3):
        store.commit(arrays(value))
    assert store.rollback(1).number == 1
    assert store.gc() == 0
    with pytest.raises(VersionError, match="current"):
        store.delete(1)
    loaded = dict(read_all(store.load(3)))
    store.delete(2)
    store.delete(3)
    with pytest.raises(VersionError, match="no version 3"):
        store.load(3)
    assert store.gc() > 0
    assert loaded["a"][0, 0] == 3  # what was read stays
    assert len(list((tmp_path / "packs").iterdir())) == len(list((tmp_path / "manifests").iterdir())) == 1
    assert store.commit(arrays(4)).number == 4  # numbers are never used again
    store.close()
    with Store.open(tmp_path) as store:
        assert [v.number for v in store.versions()] == [1, 4]
        assert store.current() == store.versions()[1]
        store.rollback(1)
    with Store.open(tmp_path) as store:
        current = store.current()
        assert current is not None
        assert current.number == 1
        check(store, 1, 1)
        for call in (store.rollback, store.delete, store.load, store.verify, store.fingerprint):
            with pytest.raises(VersionError):
                call(99)
        with pytest.raises(VersionError):
            store.commit(arrays(1), 99)


def test_a_mostly_dead_pack_is_compacted(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.commit({"dead": np.random.default_rng(0).random(10_000), "live": np.arange(10)})
        store.commit({"live": np.arange(10), "new": np.ones(3)})
        store.delete(1)
        assert store.gc() == 80_000
        assert dict(read_all(store.load(2)))["live"].tolist() == list(range(10))
    with Store.open(tmp_path) as store:
        store.verify(2)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with pytest.raises(StoreLockedError, match=rf"this very process \({os.getpid()}\) has .* open\. Close"):
        Store.open(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            Store.open(tmp_path)
        except StoreLockedError as error:
            os._exit(0 if f"process {os.getppid()} is writing" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    store.close()
    Store.open(tmp_path).close()


def test_threads_commit_one_after_the_other(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        threads = [threading.Thread(target=store.commit, args=(arrays(i),)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [v.number for v in store.versions()] == list(range(1, 7))


def test_damage_is_seen(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.commit({"w": np.arange(1000)})
        store.commit({"w": np.arange(1000) + 1})
    pack = sorted((tmp_path / "packs").iterdir())[0]
    data = bytearray(pack.read_bytes())
    data[-5] ^= 1
    pack.write_bytes(data)
    with Store.open(tmp_path) as store:
        with pytest.raises(StoreError, match="'w' of version 1 is damaged"):
            store.verify(1)
        store.verify(2)
    journal = tmp_path / "journal"
    good = journal.read_bytes()
    journal.write_bytes(b"x" + good)
    with pytest.raises(StoreError, match=rf"{journal}: .* damaged in the middle, at byte 0"):
        Store.open(tmp_path)
    journal.write_bytes(good + b"half a li")
    with Store.open(tmp_path) as store:
        assert len(store.versions()) == 2
    assert journal.read_bytes() == good
    manifest = next((tmp_path / "manifests").iterdir())
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with Store.open(tmp_path) as store, pytest.raises(StoreError, match="manifest is damaged"):
        for version in store.versions():
            store.load(version.number)
    pack.write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="pack is damaged"):
        Store.open(tmp_path)
    pack.write_bytes(data)
    Store.open(tmp_path).close()  # a failed opening gave the lock back


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file: is a file, not a directory"):
        Store.open(tmp_path / "file")
    with pytest.raises(StoreError, match="part of the path is a file"):
        Store.open(tmp_path / "file" / "store")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "packs").write_text("")
    with pytest.raises(StoreError, match="there is a file where the store needs a directory"):
        Store.open(tmp_path / "s")
    with pytest.raises(StoreError, match="the path is empty"):
        Store.open("")


def test_a_journal_that_is_gone_is_missed(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.commit(arrays(1))
    lines = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").unlink()
    for _ in range(2):
        with pytest.raises(StoreError, match="the file 'journal' is missing, though there are 1 packs"):
            Store.open(tmp_path)
    (tmp_path / "journal").write_bytes(lines)
    with Store.open(tmp_path) as store:
        check(store, 1, 1)
        (tmp_path / "journal").unlink()
        with pytest.raises(StoreError, match="the file 'journal' is gone"):
            store.commit(arrays(2))
    (tmp_path / "new").mkdir()
    with Store.open(tmp_path / "new") as store:
        assert (tmp_path / "new" / "journal").exists()
        assert store.previous(1) is None


def test_a_first_commit_that_was_cut_short_leaves_an_empty_store(tmp_path: Path) -> None:
    counting = FaultyDisk()
    with opened(tmp_path / "clean", counting) as store:
        store.commit(arrays(1))
    for step in range(counting.steps):
        disk = FaultyDisk(step, kill=True)
        with contextlib.suppress(Killed), opened(tmp_path / str(step), disk) as store:
            store.commit(arrays(1))
        for descriptor in list(disk.open):
            os.close(descriptor)
        disk.cut_power(random.Random(step))
        with Store.open(tmp_path / str(step)) as store:
            assert len(store.versions()) <= 1
            store.commit(arrays(2))


# ---------------------------------------------------------------- faults at every step


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


def collect(store: Store) -> None:
    store.delete(1)
    store.gc()


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "commit": lambda store: store.commit(arrays(3), 1),
    "partial commit": lambda store: store.commit({"a": arrays(3)["a"]}, 2),
    "rollback": lambda store: store.rollback(1),
    "delete": lambda store: store.delete(1),
    "gc": collect,
}


def prepared(path: Path) -> None:
    with Store.open(path, disk=QuickDisk()) as store:
        store.commit(arrays(1))
        store.commit(arrays(2))


def state(path: Path) -> tuple[Any, ...]:
    """What a fresh process finds: everything committed is whole."""
    with Store.open(path, disk=QuickDisk()) as store:
        for version in store.versions():
            store.verify(version.number)
        current = store.current()
        return (None if current is None else current.fingerprint, tuple(v.fingerprint for v in store.versions()))


def files(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


@contextlib.contextmanager
def opened(path: Path, disk: FaultyDisk) -> Iterator[Store]:
    store = Store.open(path, disk=disk)
    try:
        yield store
    finally:
        for descriptor in list(disk.open):
            os.close(descriptor)
        store.close()


@pytest.mark.parametrize("what", OPERATIONS)
@pytest.mark.parametrize("how", ["error", "kill", "power cut"])
def test_a_fault_at_every_step(tmp_path: Path, what: str, how: str) -> None:
    operation = OPERATIONS[what]
    prepared(tmp_path / "clean")
    before = state(tmp_path / "clean")
    counting = FaultyDisk()
    with opened(tmp_path / "clean", counting) as store:
        opening = counting.steps
        operation(store)
    after = state(tmp_path / "clean")
    assert counting.steps > opening
    for step in range(opening, counting.steps):
        for seed in range(3 if how == "power cut" else 1):
            path = tmp_path / f"{step}.{seed}"
            prepared(path)
            disk = FaultyDisk(step, kill=how != "error")
            with opened(path, disk) as store:
                with pytest.raises((StoreError, Killed)):
                    operation(store)
                if how == "error":
                    # The store object lives on: what it says is what the disk has, and the next commit works.
                    known = tuple(v.fingerprint for v in store.versions())
                    disk.at = -1
                    store.commit(arrays(9))
                    check(store, store.versions()[-1].number, 9)
                    assert known in (before[1], after[1], before[1][1:])
                    store.rollback(store.versions()[-2].number)
                    store.delete(store.versions()[-1].number)
            if how == "power cut":
                disk.cut_power(random.Random(seed))
            found = state(path)
            allowed = [before, after]
            if what == "gc":
                allowed.append((before[0], before[1][1:]))
            if how != "error":
                assert found in allowed, (step, seed)
            with Store.open(path, disk=QuickDisk()) as store:
                number = store.commit(arrays(8)).number
                check(store, number, 8)
                store.delete(store.versions()[0].number)
                for version in store.versions()[:-1]:
                    store.delete(version.number)
                store.gc()
            leftovers = files(path) - {"lock", "journal"}
            assert sum(name.startswith("manifests/") for name in leftovers) == 1, (step, leftovers)
            assert sum(name.endswith(".pack") for name in leftovers) <= 2  # what is shared lives in an older one
            assert not any(name.endswith(".tmp") for name in leftovers)


def test_a_fault_while_recovering(tmp_path: Path) -> None:
    prepared(tmp_path / "0")
    (tmp_path / "0" / "packs" / "00000009.pack.tmp").write_bytes(b"half")
    with (tmp_path / "0" / "journal").open("ab") as journal:
        journal.write(b"0000 half")
    disk = FaultyDisk(0)
    with pytest.raises(StoreError):
        Store.open(tmp_path / "0", disk=disk)
    expected = state(tmp_path / "0")
    assert len(expected[1]) == 2
    assert not list((tmp_path / "0" / "packs").glob("*.tmp"))


# ---------------------------------------------------------------- kill -9


def committer(path: Path) -> None:
    """Commit until killed; every version has one value throughout."""
    store = Store.open(path)
    value = store.versions()[-1].number if store.versions() else 0
    while True:
        value += 1
        big = np.full(20_000, value, np.float32)
        store.commit(
            {"a": big, "b": big.astype(np.float64), "c": np.full(3, value, np.int64)}, metadata={"v": str(value)}
        )
        for version in store.versions()[:-3]:
            store.delete(version.number)
        if value % 7 == 0:
            store.gc()


def kills(path: Path, count: int) -> int:
    generator = random.Random(count)
    last = 0
    for _ in range(count):
        child = os.fork()
        if child == 0:
            try:
                committer(path)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with Store.open(path) as store:
            current = store.current()
            if current is None:
                continue
            assert current.number >= last
            last = current.number
            for version in store.versions()[-2:]:
                store.verify(version.number)
                values = {float(v) for _, a in read_all(store.load(version.number)) for v in np.unique(a)}
                assert values == {float(version.metadata["v"])}
    return last


def test_kill_9_during_commits(tmp_path: Path) -> None:
    assert kills(tmp_path, 25) > 0


@pytest.mark.slow
def test_a_thousand_kills(tmp_path: Path) -> None:
    assert kills(tmp_path, 1000) > 100
