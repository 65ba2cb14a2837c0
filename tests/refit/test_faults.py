"""Faults at every step, and bad input: the engine answers as before, and one error says what was wrong."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx
import pytest

import onnx_refit
from onnx_refit.errors import EngineError, InputError, OnnxRefitError, PlanError, RefitError
from onnx_refit.moves.library import Absent, load
from onnx_refit.tensors import Array
from tests.refit.transaction_support import X, answers
from tests.support.models import mlp, mlp_weights


class UnexpectedError(Exception):
    """A fault nobody expects."""


STEPS = (
    "onnx_refit.refit.routine.Routine.see",
    "onnx_refit.refit.live.open_weights",
    "onnx_refit.refit.declared.Declared.check",
    "onnx_refit.refit.derivation.check",
    "onnx_refit.refit.derivation.unchanged",
    "onnx_refit.refit.transaction.run_canary",
    "onnx_refit.refit.publishing.frozen",
)


@pytest.mark.parametrize("fault", [UnexpectedError, MemoryError, OSError, KeyboardInterrupt, EngineError])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_at_a_step_leaves_the_engine_as_it_was(
    engine: onnx_refit.Engine, monkeypatch: pytest.MonkeyPatch, step: str, fault: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault("injected")

    if "routine" in step and isinstance(load(), Absent):
        pytest.skip("no native code was compiled")
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        given: Mapping[str, Array] = mlp_weights(1)
        if "routine" not in step:  # which takes plain dicts
            given = MappingProxyType(given)
        if step.endswith("derivation.check"):  # not asked about weights that are as declared
            given = {name: array.astype(np.float64) for name, array in given.items()}
        with pytest.raises(fault):
            engine.refit(given, canary={"x": X})
    assert engine.version == 1
    assert answers(engine, mlp_weights(0))
    engine.refit(mlp_weights(2), canary={"x": X})
    assert answers(engine, mlp_weights(2))


@pytest.mark.parametrize("fault", [UnexpectedError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["derive", "required", "recover"])
def test_a_fault_in_the_backend_leaves_the_engine_as_it_was(
    engine: onnx_refit.Engine, monkeypatch: pytest.MonkeyPatch, method: str, fault: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault("injected")

    given = {**mlp_weights(0), "b1": mlp_weights(1)["b1"]}
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._backend), method, fail)
        with pytest.raises(fault):
            engine.refit(given)
    assert engine.version == 1
    assert answers(engine, mlp_weights(0))
    engine.refit(given)
    assert answers(engine, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": None}, "w1: float32.24, 40. is missing"),
        ({"w1": np.zeros((40, 24), np.float32)}, "looks transposed"),
        ({"w1": np.full((24, 40), np.nan, np.float32)}, "not finite"),
        ({"w1": np.full((24, 40), 0.1, np.float64)}, "do not fit into float32"),
        ({"w1": np.full((24, 40), "a")}, "w1"),
    ],
)
def test_bad_weights_are_refused_and_nothing_is_lost(
    engine: onnx_refit.Engine, change: dict[str, Array | None], message: str
) -> None:
    given = {name: array for name, array in {**mlp_weights(1), **change}.items() if array is not None}
    with pytest.raises(OnnxRefitError, match=message):
        engine.refit(given)
    assert engine.version == 1
    assert answers(engine, mlp_weights(0))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "missing: 'x'"),
        ({"x": X, "z": X}, "unknown: 'z'"),
        ({"x": X.astype(np.float64)}, "float64"),
        ({"x": X[:, :-1]}, r"the shape is \[3, 23\]"),
        ({"x": X[0]}, r"the shape is \[24\]"),
    ],
)
def test_bad_inputs_are_refused(engine: onnx_refit.Engine, inputs: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.run(inputs)


def test_an_unknown_output_is_refused(engine: onnx_refit.Engine) -> None:
    assert list(engine.run({"x": X}, ["y"])) == ["y"]
    with pytest.raises(InputError, match="no output 'q'"):
        engine.run({"x": X}, ["q"])


def test_a_closed_engine_says_so(plan: onnx_refit.Plan) -> None:
    engine = onnx_refit.load(plan)
    engine.close()
    engine.close()
    for use in (lambda: engine.run({"x": X}), lambda: engine.refit(mlp_weights(1)), engine.rollback):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_a_stripped_plan_needs_weights(tmp_path: object, plan: onnx_refit.Plan) -> None:
    path = plan.save(f"{tmp_path}/stripped.plan", strip=True)
    with pytest.raises(PlanError, match="stripped"):
        onnx_refit.load(path)
    with onnx_refit.load(path, weights=mlp_weights(4)) as engine:
        assert answers(engine, mlp_weights(4))


def test_there_is_no_such_engine() -> None:
    with pytest.raises(EngineError, match="no engine 'abacus'"):
        onnx_refit.build(mlp(), engine="abacus")


def test_a_plan_without_weights_says_so(plan: onnx_refit.Plan) -> None:
    fixed = onnx_refit.build(mlp(), options=onnx_refit.BuildOptions(constant=("w1", "b1", "w2", "b2")))
    with onnx_refit.load(fixed) as engine, pytest.raises(RefitError, match="no refittable weights"):
        engine.refit(mlp_weights(1))
    with pytest.raises(PlanError, match="no refittable weights"):
        onnx_refit.check(fixed, mlp_weights(1))


def test_a_changed_constant_is_not_ignored() -> None:
    def scaled(factor: float, seed: int) -> onnx.ModelProto:
        model = mlp(mlp_weights(seed))
        model.graph.node[2].CopyFrom(onnx.helper.make_node("Mul", ["b", "factor"], ["c"]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        return model

    with onnx_refit.load(onnx_refit.build(scaled(1.5, 0))) as engine:
        assert engine.refit(scaled(1.5, 1)).version == 2
        with pytest.raises(RefitError, match="factor: it is constant in this plan"):
            engine.refit(scaled(2.5, 2))
        assert engine.version == 2
    assert not onnx_refit.check(onnx_refit.build(scaled(1.5, 0)), scaled(2.5, 0)).ok
    named = onnx_refit.build(scaled(1.5, 0), options=onnx_refit.BuildOptions(refittable=("factor",)))
    with onnx_refit.load(named) as engine:
        assert engine.refit(scaled(2.5, 0)).changed == ("factor",)


def test_partial_and_options_go_together(engine: onnx_refit.Engine) -> None:
    given = {"b1": mlp_weights(1)["b1"]}
    assert engine.refit(given, onnx_refit.CheckOptions(), partial=True).changed == ("b1",)


def test_unknown_keep_is_refused(plan: onnx_refit.Plan) -> None:
    with pytest.raises(EngineError, match="keep"):
        onnx_refit.load(plan, keep=0)
