"""Weights written by several threads, and interrupts on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from onnx_refit.engine.onnxruntime import backend as backends
from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.crew import Crew
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.moves.library import Absent
from onnx_refit.plan.compile import compile_model

from .zoo import model, n, weight, x_of


def test_a_helper_that_comes_late_does_nothing() -> None:
    done: list[int] = []
    crew = Crew([(1, done.append, (k,)) for k in range(3)])
    crew.finish()
    crew.help()
    assert not done


def test_finishing_waits_for_the_task_in_hand_and_begins_no_other() -> None:
    begun, go = threading.Event(), threading.Event()
    done: list[int] = []

    def slow() -> None:
        begun.set()
        go.wait(60)
        done.append(0)

    crew = Crew([(1, slow, ()), (1, done.append, (1,))])
    helper = threading.Thread(target=crew.help)
    helper.start()
    assert begun.wait(60)
    finished = threading.Thread(target=crew.finish)
    finished.start()
    finished.join(0.1)
    assert finished.is_alive()
    go.set()
    finished.join(60)
    assert done == [0]
    helper.join(60)


def test_what_a_helper_raises_is_raised() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    crew = Crew([(1, fail, ())])
    crew.help()
    crew.finish()
    with pytest.raises(ZeroDivisionError):
        crew.check()


def test_an_interrupted_wait_is_waited_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun, done = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go.wait(60)
        done.set()

    crew = Crew([(1, slow, ())])
    helper = threading.Thread(target=crew.help)
    helper.start()
    assert begun.wait(60)
    wait = threading.Condition.wait

    def interrupted(self: threading.Condition, timeout: float | None = None) -> bool:
        if not go.is_set() and self is crew._changed:
            go.set()
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(threading.Condition, "wait", interrupted)
    go.clear()
    with pytest.raises(KeyboardInterrupt):
        crew.finish()
    assert done.is_set()
    helper.join(60)


@pytest.mark.parametrize("late", [True, False])
def test_an_interrupt_while_helpers_are_called_leaves_no_writer_behind(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = weight(np.random.default_rng(0), "w", 1024, 1024)
    made = model([n("MatMul", "x w", "y")], [("x", ["M", 1024])], [("y", None)], [matrix])
    compilation = compile_model(made)
    monkeypatch.setattr(backends, "load_moves", lambda: Absent("Python's writers are tested"))
    backend = create(compilation.compiled, None, OnnxRuntimeOptions(threads=2))
    w = compilation.weights["w"]
    backend.derive({"w": w * 2})
    go = threading.Event()
    helpers: list[Future[None]] = []
    submit = ThreadPoolExecutor.submit

    def interrupted(self: ThreadPoolExecutor, call: Callable[[], None]) -> None:
        def helper() -> None:
            if late:
                go.wait(60)
            call()

        helpers.append(submit(self, helper))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ThreadPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.derive({"w": w * 7})
    weights = backend.derive({"w": w * 5})
    inputs = x_of(2, 1024)
    first = backend.run(weights, inputs)["y"]
    go.set()
    assert len(helpers) == 1
    helpers[0].result(60)
    assert np.array_equal(backend.run(weights, inputs)["y"], first)
    assert np.array_equal(backend.recover(weights, "w"), w * 5)
    backend.close()
