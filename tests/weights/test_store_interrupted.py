"""Ctrl-C while the journal is being written: what was committed stays, in memory and on disk alike."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from onnx_refit.errors import StoreError
from onnx_refit.weights.store import Store
from onnx_refit.weights.store.disk import Disk


class Interrupted(Disk):
    """Fails once, right after or right before the journal is made durable."""

    fault: BaseException | None = None

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        if self.fault is not None and Path(f"/proc/self/fd/{descriptor}").readlink().name == "journal":
            fault, self.fault = self.fault, None
            raise fault


def arrays(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(4, value, np.float32)}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")  # noqa: PTH112
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), MemoryError(), OSError(28, "full")])
def test_an_interrupted_commit_harms_no_later_one(tmp_path: Path, fault: BaseException) -> None:
    disk = Interrupted()
    with Store.open(tmp_path / "store", disk=disk) as store:
        store.commit(arrays(1))
        disk.fault = fault
        with pytest.raises((type(fault), StoreError)):
            store.commit(arrays(2))
        current = store.current()
        assert current is not None
        assert current.number == 1
        later = [store.commit(arrays(3)).number, store.commit(arrays(4)).number]
        disk.fault = OSError(28, "full")
        with pytest.raises(StoreError):
            store.commit(arrays(5))
        held = [record.number for record in store.versions()]
        assert held == [1, *later]
    with Store.open(tmp_path / "store") as store:
        assert [record.number for record in store.versions()] == held
        np.testing.assert_array_equal(store.load(later[-1]).read("w"), arrays(4)["w"])
