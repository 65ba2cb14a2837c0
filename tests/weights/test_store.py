"""The version store: commits, sharing, rollback, collection, one writer, damage."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from onnx_refit.errors import StoreError, StoreLockedError, VersionError
from onnx_refit.weights.fingerprint import fingerprint
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.source import read_all
from onnx_refit.weights.store import Store
from tests.weights.store_support import FaultyDisk, Killed, arrays, check, opened


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
