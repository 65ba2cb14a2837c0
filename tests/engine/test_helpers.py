"""Threads that help with batches, waiting in native code: each unit is done once, and by nobody afterwards."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import onnx_refit
from onnx_refit.engine.onnxruntime import workers
from onnx_refit.engine.onnxruntime.batch import Batcher, Ready
from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.helpers import Helpers
from onnx_refit.engine.onnxruntime.moving import SPLIT
from onnx_refit.moves.library import Library, load
from onnx_refit.plan.trace.recipes import Recipe, whole
from onnx_refit.tensors import TensorSpec

from .zoo import model, n, weight

found = load()
pytestmark = pytest.mark.skipif(not isinstance(found, Library) or not found.helped, reason="no native helpers here")

UNITS = 24
SIZE = UNITS * SPLIT


class Batches:
    """Batches that copy one tensor."""

    def __init__(self) -> None:
        assert isinstance(found, Library)
        spec = TensorSpec("t", "float32", (SIZE,))
        recipe: Recipe = whole(spec, "source:w")
        dtypes = {"source:w": np.dtype(np.float32)}
        self.batcher = Batcher(found, {"t": recipe}, dtypes, {"source:w": SIZE}, {}, "source:")
        self.target = Storage(spec)

    def of(self, value: float) -> Ready:
        return self.batcher.ready({"t": self.target}, {"source:w": np.full(SIZE, value, np.float32)}, {}, {})


def every() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "onnx-refit-helper"]


Helping = Callable[[], list[threading.Thread]]


@pytest.fixture
def helping() -> Helping:
    """The helpers that live, but those of engines that live on from other tests."""
    gc.collect()
    others = set(every())
    return lambda: [thread for thread in every() if thread not in others]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("roused", [False, True])
def test_each_batch_is_whole_and_nobody_works_on_it_afterwards(helping: Helping, count: int, roused: bool) -> None:
    assert isinstance(found, Library)
    helpers, batches = Helpers(found, count), Batches()
    for number in range(1, 60):
        ready = batches.of(number)
        if roused:
            helpers.rouse()
        helpers.work(ready.address)
        assert found.left(ready.address) == 0
        assert (batches.target.flat == number).all()
        batches.target.flat[:] = -1
        assert (batches.target.flat == -1).all()
    assert len(helping()) == count
    helpers.close()
    assert not helping()


def test_a_helper_does_what_the_caller_does_not() -> None:
    """It waits in native code until there is a batch, so the caller need not be in it."""
    assert isinstance(found, Library)
    helpers, batches = Helpers(found, 1), Batches()
    ready = batches.of(7)
    helpers._table[1] = ready.address
    helpers.rouse()
    while found.left(ready.address):
        pass
    helpers._table[1] = 0
    assert (batches.target.flat == 7).all()
    helpers.close()


def test_without_helpers_a_batch_is_done_all_the_same(helping: Helping) -> None:
    assert isinstance(found, Library)
    helpers, batches = Helpers(found, 2), Batches()
    helpers.close()
    helpers.rouse()
    ready = batches.of(3)
    helpers.work(ready.address)
    assert (batches.target.flat == 3).all()
    assert not helping()


def test_helpers_that_are_dropped_end(helping: Helping) -> None:
    assert isinstance(found, Library)
    helpers = Helpers(found, 2)
    helpers.rouse()
    threads = helping()
    assert len(threads) == 2
    gone = weakref.ref(helpers)
    del helpers
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_refits_of_an_engine_with_threads_are_helped(helping: Helping, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    together: Any = Helpers.work

    def noting(self: Helpers, batch: int) -> None:
        used.append(batch)
        together(self, batch)

    monkeypatch.setattr(Helpers, "work", noting)
    monkeypatch.setattr(workers, "_MOVED", 1)
    rng = np.random.default_rng(0)
    made = model([n("MatMul", "x w", "y")], [("x", ["M", 96])], [("y", None)], [weight(rng, "w", 96, 64)])
    options = onnx_refit.EngineOptions(2)
    with onnx_refit.load(onnx_refit.build(made, options=onnx_refit.BuildOptions(engine=options)), options=options) as e:
        for number in range(1, 20):
            e.refit({"w": np.full((96, 64), number, np.float32)})
            answer = e.run({"x": np.ones((2, 96), np.float32)})["y"]
            np.testing.assert_array_equal(answer, np.full((2, 64), 96 * number, np.float32))
        assert used
        assert helping()
    assert not helping()
