"""A refit leaves the cores to requests where these need them all, and only there; a thread is afterwards as it was."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import onnx_refit
from onnx_refit.engine.onnxruntime import backend as backends
from onnx_refit.engine.onnxruntime.batch import Batcher, Ready
from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.moving import SPLIT
from onnx_refit.engine.onnxruntime.weightset import OnnxRuntimeWeightSet
from onnx_refit.moves.library import Library, load
from onnx_refit.plan.trace.recipes import whole
from onnx_refit.tensors import TensorSpec

from .zoo import model, n, weight

found = load()
pytestmark = pytest.mark.skipif(not isinstance(found, Library), reason="no native code was compiled")
_GET_TIMERSLACK = 30


def _slack() -> int:
    return int(ctypes.CDLL(None).prctl(_GET_TIMERSLACK, 0, 0, 0, 0))


def large() -> tuple[Batcher, Ready, Storage, np.ndarray, int]:
    assert isinstance(found, Library)
    units = 4
    values = np.arange(units * SPLIT, dtype=np.float32)
    spec = TensorSpec("t", "float32", (values.size,))
    batcher = Batcher(
        found, {"t": whole(spec, "source:s")}, {"source:s": values.dtype}, {"source:s": values.size}, {}, "source:"
    )
    storage = Storage(spec)
    return batcher, batcher.ready({"t": storage}, {"source:s": values}, {}, {}), storage, values, units


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's accounts")
@pytest.mark.parametrize("pause", [0, 9])
def test_a_thread_sleeps_after_each_unit_if_it_should_and_is_as_it_was(pause: int) -> None:
    resource = importlib.import_module("resource")  # there is none on Windows

    def work() -> int:
        batcher, ready, storage, values, units = large()
        before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), _slack()
        slept: int = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        batcher.library.pace(ready.address, pause, 1 << 40)
        slept = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - slept
        assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), _slack()) == before
        np.testing.assert_array_equal(storage.flat, values)
        return slept - units

    with ThreadPoolExecutor(1) as pool:
        # The least of three: a thread of a busy machine may wait for something else too.
        more = min(pool.submit(work).result() for _ in range(3))
    assert more >= 0 if pause else more < 0


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no such policy here")
def test_a_thread_of_another_policy_keeps_it() -> None:
    def work() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        batcher, ready, *_ = large()
        batcher.library.pace(ready.address, 9, 1 << 40)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.parametrize(("cores", "under_way", "done_by"), [(2, True, "pace"), (2, False, "work"), (8, True, "pace")])
def test_refits_leave_cores_and_bandwidth_to_requests_only_while_there_are_any(
    cores: int, under_way: bool, done_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(found, Library)
    monkeypatch.setattr(backends, "usable_cores", lambda: cores)
    used: list[tuple[str, int]] = []

    def noting(name: str) -> Callable[..., Any]:
        def call(*arguments: int) -> Any:
            used.append((name, arguments[1] if len(arguments) == 3 else 0))
            return getattr(found, name)(*arguments)

        return call

    calls: dict[str, Any] = {name: noting(name) for name in ("work", "pace", "share")}
    noted = replace(found, **calls)
    monkeypatch.setattr(backends, "load_moves", lambda: noted)
    rng = np.random.default_rng(0)
    made = model([n("MatMul", "x w", "y")], [("x", ["M", 96])], [("y", None)], [weight(rng, "w", 96, 64)])
    options = onnx_refit.EngineOptions(2)
    plan = onnx_refit.build(made, options=onnx_refit.BuildOptions(engine=options))
    with onnx_refit.load(plan, options=options) as engine:
        used.clear()
        new = {"w": np.ones((96, 64), np.float32)}
        inputs = {"x": np.ones((1, 96), np.float32)}
        if under_way:
            run = OnnxRuntimeWeightSet.run

            def refitting(self: OnnxRuntimeWeightSet, given: Any) -> Any:
                engine.refit(new)
                return run(self, given)

            monkeypatch.setattr(OnnxRuntimeWeightSet, "run", refitting)
            engine.run(inputs)
            monkeypatch.setattr(OnnxRuntimeWeightSet, "run", run)
        else:
            engine.refit(new)
        assert {name for name, _ in used} == {done_by}
        assert [rest > 0 for _, rest in used] == [under_way] * len(used)
        np.testing.assert_array_equal(engine.run(inputs)["y"], np.full((1, 64), 96, np.float32))
