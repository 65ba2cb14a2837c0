"""A refit leaves the cores to requests where these need them all, and only there; a thread is afterwards as it was."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import onnx_refit
from onnx_refit.engine.onnxruntime import backend as backends
from onnx_refit.engine.onnxruntime.batch import Batcher, Ready
from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.moving import SPLIT
from onnx_refit.engine.onnxruntime.weightset import OnnxRuntimeWeightSet
from onnx_refit.moves.library import BATCH, Library, load
from onnx_refit.plan.trace.recipes import whole
from onnx_refit.tensors import TensorSpec

from .zoo import model, n, weight

found = load()
pytestmark = pytest.mark.skipif(not isinstance(found, Library), reason="no native code was compiled")
_GET_TIMERSLACK = 30


def _slack() -> int:
    return int(ctypes.CDLL(None).prctl(_GET_TIMERSLACK, 0, 0, 0, 0))


def _large(pause: int) -> tuple[Batcher, Ready, Storage, np.ndarray, int]:
    assert isinstance(found, Library)
    units = 4
    values = np.arange(units * SPLIT, dtype=np.float32)
    spec = TensorSpec("t", "float32", (values.size,))
    batcher = Batcher(
        found, {"t": whole(spec, "source:s")}, {"source:s": values.dtype}, {"source:s": values.size}, {}, "source:"
    )
    storage = Storage(spec)
    return batcher, batcher.ready({"t": storage}, {"source:s": values}, {}, {}, pause), storage, values, units


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's accounts")
@pytest.mark.parametrize("pause", [0, 9])
def test_a_thread_sleeps_after_each_unit_if_it_should_and_is_as_it_was(pause: int) -> None:
    resource = importlib.import_module("resource")  # there is none on Windows

    def work() -> None:
        batcher, ready, storage, values, units = _large(pause)
        before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), _slack()
        slept = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        batcher.library.work(ready.address)
        slept = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - slept
        assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), _slack()) == before
        assert slept >= units if pause else slept < units
        np.testing.assert_array_equal(storage.flat, values)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no such policy here")
def test_a_thread_of_another_policy_keeps_it() -> None:
    def work() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        batcher, ready, *_ = _large(9)
        batcher.library.work(ready.address)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.parametrize(("cores", "under_way", "paused"), [(2, True, True), (2, False, False), (4, True, False)])
def test_refits_pause_only_while_requests_need_every_core(
    cores: int, under_way: bool, paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "usable_cores", lambda: cores)
    rng = np.random.default_rng(0)
    made = model([n("MatMul", "x w", "y")], [("x", ["M", 96])], [("y", None)], [weight(rng, "w", 96, 64)])
    options = onnx_refit.EngineOptions(2)
    plan = onnx_refit.build(made, options=onnx_refit.BuildOptions(engine=options))
    pauses: list[int] = []
    ready = Batcher.ready

    def noted(self: Batcher, *arguments: Any, **more: Any) -> Ready:
        done = ready(self, *arguments, **more)
        pauses.append(done.header[BATCH.index("pause")])
        return done

    monkeypatch.setattr(Batcher, "ready", noted)
    with onnx_refit.load(plan, options=options) as engine:
        pauses.clear()
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
        assert [pause > 0 for pause in pauses] == [paused]
        np.testing.assert_array_equal(engine.run(inputs)["y"], np.full((1, 64), 96, np.float32))
