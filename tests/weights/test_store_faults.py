"""The version store when the disk fails, the process is killed or the power goes, at every step in turn."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_refit.errors import StoreError
from onnx_refit.weights.source import read_all
from onnx_refit.weights.store import Store
from tests.weights.store_support import FaultyDisk, Killed, QuickDisk, arrays, check, opened


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
    last = idle = 0
    for _ in range(count):
        child = os.fork()
        if child == 0:
            try:
                committer(path)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.002, 0.03) * (1 + idle))  # longer where the machine is too busy to commit
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with Store.open(path) as store:
            current = store.current()
            idle = 0 if current is not None and current.number > last else idle + 1
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
