"""Weights that a refit leaves to be computed: made between two requests, of one version, whatever came before.

Each test runs on PyTorch's CPU device, where operators stand in for kernels, and again on a GPU under its mark.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from onnx_refit.engine.cuda.folding import Unfolded  # noqa: E402
from onnx_refit.engine.cuda.options import Precision  # noqa: E402
from onnx_refit.errors import RefitRejectedError  # noqa: E402
from onnx_refit.tensors import Array  # noqa: E402

from .models import make, mlp, random_like, weight  # noqa: E402
from .taken import bits, by_host, loaded, planned, there  # noqa: E402
from .test_backend import rows, same, wanted  # noqa: E402

pytestmark = pytest.mark.torch


def two_products() -> onnx.ModelProto:
    """Two weights that are products of two, with a plain one between them."""
    nodes = [
        helper.make_node("Mul", ["w", "s"], ["ws"]),
        helper.make_node("MatMul", ["x", "ws"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Mul", ["v", "t"], ["vt"]),
        helper.make_node("MatMul", ["c", "vt"], ["y"]),
    ]
    tensors = {"w": (8, 64), "s": (1, 64), "b": (64,), "v": (64, 4), "t": (1, 4)}
    return make(
        nodes, {"x": ["N", 8]}, {"y": ["N", 4]}, **{name: weight(name, *shape) for name, shape in tensors.items()}
    )


def held(engine: Any) -> Any:
    return engine._versions.current.weights


def test_a_whole_refit_writes_the_sources_and_not_what_is_made_of_them(device: str) -> None:
    plan = planned(two_products())
    assert plan.weights is not None
    with loaded(plan, device) as engine:
        given = there(random_like(dict(plan.weights), 1), device)
        engine.refit(given)
        arena = held(engine).arena
        assert isinstance(arena, Unfolded) and len(arena.later) == 2
        assert arena.storage.numel() == arena.layout.stem + arena.folding.aside.nbytes
        engine.refit({"w": given["w"] * 2}, partial=True)
        assert not isinstance(held(engine).arena, Unfolded), "a partial refit is small"
    plan = planned(mlp())
    assert plan.weights is not None
    with loaded(plan, device) as engine:
        engine.refit(there(random_like(dict(plan.weights), 1), device))
        assert not isinstance(held(engine).arena, Unfolded), "there is nothing to fold"


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_versions_answer_in_any_order(precision: Precision, device: str) -> None:
    """Whole refits, partial ones over them, host ones between; each version asked after each other one."""
    model, x = two_products(), rows(3)
    plan = planned(model)
    assert plan.weights is not None
    values = dict(plan.weights)
    states: dict[int, dict[str, Array]] = {1: values}
    with loaded(plan, device, precision=precision, graph_after=1) as engine:
        engine._versions.keep = 100

        def commit(changed: dict[str, Array], *, host: bool = False, ask: bool = False) -> None:
            now = {**states[engine.version], **changed}
            given = changed if host else there(changed, device)
            engine.refit(given, partial=len(changed) < len(now))
            states[engine.version] = now
            if ask:
                engine.run(x)

        other = [random_like(values, seed) for seed in range(8)]
        commit(other[0])
        commit(other[1], ask=True)
        commit({"s": other[2]["s"]})  # over one that no request saw made
        commit({"v": other[2]["v"]}, ask=True)
        commit({"b": other[3]["b"]})
        commit(other[4], host=True)
        commit({"t": other[5]["t"]})
        commit(other[6])
        commit({"w": other[7]["w"]}, ask=True)
        commit({"t": other[7]["t"]}, host=True)
        numbers = list(states)
        answers = {}
        for number in numbers:
            # An engine of its own, refitted from host arrays: every weight was copied to where graphs read it.
            with loaded(plan, device, precision=precision, graph_after=1) as fresh:
                fresh.refit(states[number])
                answers[number] = fresh.run(x)["y"]
            if precision is Precision.FP32:
                assert same(answers[number], wanted(model, states[number], x)[0])
        for first in numbers:
            for second in numbers:
                for number in (first, second):
                    assert np.array_equal(engine.run(x, version=number)["y"], answers[number]), (first, second)
        for number in reversed(numbers):
            engine.rollback(number)
            assert np.array_equal(engine.run(x)["y"], answers[number])
            read = engine.weights()
            assert all(np.array_equal(read.read(name), array) for name, array in states[number].items())


def test_what_is_made_has_the_bits_of_the_host(device: str) -> None:
    """Where graphs read it, and where somebody asks for a single weight."""
    plan = planned(two_products())
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 2)
    with loaded(plan, device) as engine:
        engine.refit(there(values, device))
        engine.run(rows(2))
        expected = by_host(plan, device, values)
        live = engine._backend.runner.live.arena
        found = {n: live.view(n).contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for n in expected}
        assert found == expected
        assert bits(engine) == expected


def test_each_answer_is_of_one_version_while_refits_go_on(device: str) -> None:
    model, x = two_products(), rows(16)
    plan = planned(model)
    assert plan.weights is not None
    states = [random_like(dict(plan.weights), seed) for seed in range(2)]
    wrong: list[str] = []
    with loaded(plan, device, graph_after=1) as engine:
        sets = [there(values, device) for values in states]
        bound = [engine.bind(tensors) for tensors in sets]
        engine.refit(bound[0])
        answers = []
        for one in (bound[1], bound[0]):
            engine.refit(one)
            answers.append(engine.run(x)["y"])
        parity = engine.version % 2  # the version that has the first state
        answers.reverse()
        assert not same(answers[0], answers[1])
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                results = engine.run(x)
                expected = answers[0 if results.version % 2 == parity else 1]
                if not np.array_equal(results["y"], expected):
                    wrong.append(f"version {results.version}")
                    return

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(200):
            engine.refit(bound[(turn + 1) % 2])
            if turn % 10 == 9:
                # A refused one in between: nothing of it may be seen.
                name = ("w", "s", "b")[turn // 10 % 3]
                kept = sets[turn % 2][name].clone()
                sets[turn % 2][name].fill_(float("nan"))
                with pytest.raises(RefitRejectedError):
                    engine.refit(bound[turn % 2])
                sets[turn % 2][name].copy_(kept)
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not wrong, wrong[:3]
