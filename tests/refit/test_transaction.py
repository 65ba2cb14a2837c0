"""The transaction: stage, check, derive, canary, commit, rollback, and what happens when each of them fails."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.numpy

import onnx_refit
from onnx_refit.errors import CanaryError, EngineError, InputError, OnnxRefitError, PlanError, RefitError, VersionError
from onnx_refit.refit.canary import run_canary
from onnx_refit.tensors import Array
from tests.support.models import (
    conv_bn,
    conv_bn_weights,
    mlp,
    mlp_input,
    mlp_reference,
    mlp_weights,
)

X = mlp_input()


@pytest.fixture(scope="module")
def plan() -> onnx_refit.Plan:
    return onnx_refit.build(mlp())


@pytest.fixture
def engine(plan: onnx_refit.Plan) -> Iterator[onnx_refit.Engine]:
    with onnx_refit.load(plan, keep=3) as loaded:
        yield loaded


def answers(engine: onnx_refit.Engine, weights: dict[str, Array]) -> bool:
    return bool(np.allclose(engine.run({"x": X})["y"], mlp_reference(weights, X), rtol=1e-4, atol=1e-4))


def fresh(weights: dict[str, Array]) -> Array:
    session = ort.InferenceSession(mlp(weights).SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": X})[0]
    return result


def test_a_refit_gives_what_a_fresh_session_gives(engine: onnx_refit.Engine) -> None:
    for seed in range(1, 6):
        new = mlp_weights(seed)
        report = engine.refit(new)
        assert report.version == engine.version == seed + 1
        assert set(report.changed) == set(new)
        np.testing.assert_allclose(engine.run({"x": X})["y"], fresh(new), rtol=1e-5, atol=1e-5)


def test_every_answer_names_its_version_and_held_versions_can_be_asked(engine: onnx_refit.Engine) -> None:
    first = engine.run({"x": X})
    engine.refit(mlp_weights(1))
    second = engine.run({"x": X})
    assert (first.version, second.version) == (1, 2)
    again = engine.run({"x": X}, version=1)
    assert again.version == 1
    np.testing.assert_array_equal(again["y"], first["y"])


def test_rollback_gives_the_same_bits_back(engine: onnx_refit.Engine) -> None:
    before = engine.run({"x": X})["y"]
    engine.refit(mlp_weights(1))
    report = engine.rollback()
    assert (report.version, report.previous) == (1, 2)
    np.testing.assert_array_equal(engine.run({"x": X})["y"], before)
    for name, array in mlp_weights(0).items():
        np.testing.assert_array_equal(engine.weights().read(name), array)


def test_rollback_without_an_earlier_version_is_refused(engine: onnx_refit.Engine) -> None:
    with pytest.raises(VersionError, match="no earlier version"):
        engine.rollback()


def test_versions_beyond_keep_are_forgotten_but_listed(engine: onnx_refit.Engine) -> None:
    for seed in range(1, 5):
        engine.refit(mlp_weights(seed))
    assert [(info.number, info.held, info.current) for info in engine.versions] == [
        (1, False, False),
        (2, False, False),
        (3, True, False),
        (4, True, False),
        (5, True, True),
    ]
    with pytest.raises(VersionError, match="no longer held"):
        engine.run({"x": X}, version=1)
    with pytest.raises(VersionError, match="does not exist"):
        engine.rollback(to=99)


def test_the_memory_of_versions_is_bounded(engine: onnx_refit.Engine) -> None:
    weights = [{"b1": mlp_weights(seed)["b1"]} for seed in range(2)]
    for turn in range(1200):
        engine.refit(weights[turn % 2], partial=True)
    assert engine.version == 1201
    assert len(engine.versions) < 1010
    assert engine.versions[-1].number == 1201
    with pytest.raises(VersionError, match="no longer held"):
        engine.run({"x": X}, version=1)


def test_a_partial_refit_changes_what_it_gives(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(1)
    report = engine.refit({"b1": new["b1"]}, partial=True)
    assert report.changed == ("b1",)
    assert set(report.unchanged) == {"w1", "w2", "b2"}
    assert answers(engine, {**mlp_weights(0), "b1": new["b1"]})


def test_weights_given_but_equal_are_shared_not_written(engine: onnx_refit.Engine) -> None:
    new = {**mlp_weights(0), "w2": mlp_weights(1)["w2"]}
    report = engine.refit(new)
    assert report.changed == ("w2",)
    info = engine.versions[-1]
    assert info.shared_nbytes > 0
    assert answers(engine, new)


def test_one_changed_element_is_seen(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(0)
    for index in (0, 501, new["w1"].size - 1):
        new["w1"].reshape(-1)[index] += 1.0
        assert engine.refit(new).changed == ("w1",)
        assert answers(engine, new)


def test_a_staged_set_is_seen_by_nobody_until_it_is_committed(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    assert engine.version == 1
    assert answers(engine, mlp_weights(0))
    np.testing.assert_allclose(staged.run({"x": X})["y"], mlp_reference(mlp_weights(1), X), rtol=1e-4, atol=1e-4)
    staged.commit()
    assert answers(engine, mlp_weights(1))


def test_a_discarded_set_cannot_be_used(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    staged.discard()
    for use in (staged.commit, lambda: staged.run({"x": X}), lambda: staged.canary({"x": X})):
        with pytest.raises(RefitError, match="discarded"):
            use()
    assert engine.version == 1


def test_a_set_is_committed_once(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    staged.commit()
    with pytest.raises(RefitError, match="committed"):
        staged.commit()
    assert engine.version == 2


def test_leaving_the_block_discards(engine: onnx_refit.Engine) -> None:
    with pytest.raises(ZeroDivisionError), engine.stage(mlp_weights(1)) as staged:
        raise ZeroDivisionError
    assert staged.state.value == "discarded"
    assert engine.version == 1


def test_a_partial_set_staged_on_an_old_version_is_refused(engine: onnx_refit.Engine) -> None:
    staged = engine.stage({"b1": mlp_weights(1)["b1"]}, partial=True)
    engine.refit(mlp_weights(2))
    with pytest.raises(RefitError, match="version 2 was committed since"):
        staged.commit()
    assert answers(engine, mlp_weights(2))


def test_a_complete_set_staged_on_an_old_version_is_taken(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    engine.refit(mlp_weights(2))
    staged.commit()
    assert answers(engine, mlp_weights(1))


def test_the_callers_arrays_may_change_after_a_refit(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(1)
    engine.refit(new)
    before = engine.run({"x": X})["y"]
    for array in new.values():
        array[...] = 0
    np.testing.assert_array_equal(engine.run({"x": X})["y"], before)
    engine.refit({"b1": mlp_weights(3)["b1"]}, partial=True)
    assert answers(engine, {**mlp_weights(1), "b1": mlp_weights(3)["b1"]})


# ---------------------------------------------------------------- weights that are folded


def test_folded_weights_refit_partially_and_roll_back() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)

    def expected(weights: dict[str, Array]) -> Array:
        session = ort.InferenceSession(conv_bn(weights).SerializeToString(), providers=["CPUExecutionProvider"])
        result: Array = session.run(None, {"x": x})[0]
        return result

    with onnx_refit.load(onnx_refit.build(conv_bn())) as engine:
        weights = conv_bn_weights(0)
        for seed, name in enumerate(["scale", "w", "mean", "var", "bias"], start=1):
            weights[name] = conv_bn_weights(seed)[name]
            given = weights[name].copy()
            engine.refit({name: given}, partial=True)
            given[...] = np.nan  # the engine must not look at the caller's array again
            np.testing.assert_allclose(engine.run({"x": x})["y"], expected(weights), rtol=1e-4, atol=1e-5)
            for other, array in weights.items():
                np.testing.assert_array_equal(engine.weights().read(other), array)
        engine.rollback()
        weights["bias"] = conv_bn_weights(0)["bias"]
        np.testing.assert_allclose(engine.run({"x": x})["y"], expected(weights), rtol=1e-4, atol=1e-5)


def test_the_arrays_given_at_load_may_change_afterwards() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)
    given, weights = conv_bn_weights(1), conv_bn_weights(1)
    with onnx_refit.load(onnx_refit.build(conv_bn()), weights=given) as engine:
        fingerprint = engine.fingerprint()
        for array in given.values():
            array[...] = 9
        assert engine.fingerprint() == fingerprint
        weights["scale"] = conv_bn_weights(2)["scale"]
        engine.refit({"scale": weights["scale"]}, partial=True)
        session = ort.InferenceSession(conv_bn(weights).SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(engine.run({"x": x})["y"], session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_weights_read_back_cannot_be_used_to_change_the_engine() -> None:
    with onnx_refit.load(onnx_refit.build(conv_bn())) as engine:
        for name in engine.refittable:
            array = engine.weights().read(name)
            edited = array.copy()
            if array.flags.writeable:
                array[...] = 7  # a copy: the engine must not see it
                np.testing.assert_array_equal(engine.weights().read(name), edited)
            edited.reshape(-1)[-1] += 1.0
            assert engine.refit({name: edited}, partial=True).changed == (name,)


def test_a_plan_keeps_its_weights_when_the_callers_arrays_change() -> None:
    given = mlp_weights(3)
    plan = onnx_refit.refit_plan(onnx_refit.build(mlp()), given)
    given["w1"][...] = 0
    assert plan.weights is not None
    np.testing.assert_array_equal(plan.weights["w1"], mlp_weights(3)["w1"])


# ---------------------------------------------------------------- canary


def test_a_canary_judges_bfloat16_as_numbers() -> None:
    def outputs(value: float) -> dict[str, Array]:
        return {"y": np.full(4, value, ml_dtypes.bfloat16)}

    near = onnx_refit.Canary({}, {"y": np.full(4, 1.0, np.float32)}, rtol=0.1, atol=0.1)
    assert run_canary(near, lambda _: outputs(1.05)).worst["y"] < 0.1
    with pytest.raises(CanaryError, match="differs"):
        run_canary(near, lambda _: outputs(2.0))
    with pytest.raises(CanaryError, match="NaN"):
        run_canary(near, lambda _: outputs(float("nan")))


def test_a_good_canary_passes_and_is_timed(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(1)
    staged = engine.stage(new)
    result = staged.canary({"x": X}, {"y": mlp_reference(new, X)}, rtol=1e-3, atol=1e-3)
    assert result.worst["y"] < 1e-3
    report = staged.commit()
    assert report.seconds["canary"] > 0


@pytest.mark.parametrize(
    ("canary", "message"),
    [
        (onnx_refit.Canary({"x": X}, {"y": np.zeros((3, 10))}), "differs from what the canary expects"),
        (onnx_refit.Canary({"x": X}, {"y": np.zeros((2, 10))}), "the shape is"),
        (onnx_refit.Canary({"x": X}, {"z": np.zeros((3, 10))}), "does not have"),
        (onnx_refit.Canary({"x": X}, accept=lambda _: False), "judge refused"),
        (onnx_refit.Canary({"x": X}, accept=lambda _: "too sure of itself"), "too sure of itself"),
        (onnx_refit.Canary({"x": X}, accept=lambda outputs: bool(outputs["nothing"].any())), "KeyError"),
        (onnx_refit.Canary({"x": X * np.float32(np.inf)}), "NaN or Inf"),
    ],
)
def test_a_bad_canary_stops_the_refit(engine: onnx_refit.Engine, canary: onnx_refit.Canary, message: str) -> None:
    with pytest.raises(CanaryError, match=message):
        engine.refit(mlp_weights(1), canary=canary)
    assert engine.version == 1
    assert answers(engine, mlp_weights(0))
    engine.refit(mlp_weights(1))
    assert answers(engine, mlp_weights(1))


def test_what_a_canary_refused_is_committed_by_force_only(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    with pytest.raises(CanaryError):
        staged.canary({"x": X}, {"y": np.zeros((3, 10))})
    with pytest.raises(CanaryError, match="refused these weights"):
        staged.commit()
    assert engine.version == 1
    assert staged.commit(force=True).version == 2


def test_the_last_canary_decides(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    with pytest.raises(CanaryError):
        staged.canary({"x": X}, {"y": np.zeros((3, 10))})
    staged.canary({"x": X}, {"y": mlp_reference(mlp_weights(1), X)}, rtol=1e-3, atol=1e-3)
    assert staged.commit().version == 2


# ---------------------------------------------------------------- faults, injected at every step


class UnexpectedError(Exception):
    """A fault nobody expects."""


STEPS = (
    "onnx_refit.refit.live.open_weights",
    "onnx_refit.refit.derivation.check",
    "onnx_refit.refit.derivation.unchanged",
    "onnx_refit.refit.transaction.run_canary",
    "onnx_refit.refit.live.Version",
)


@pytest.mark.parametrize("fault", [UnexpectedError, MemoryError, OSError, KeyboardInterrupt, EngineError])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_at_a_step_leaves_the_engine_as_it_was(
    engine: onnx_refit.Engine, monkeypatch: pytest.MonkeyPatch, step: str, fault: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault("injected")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(fault):
            engine.refit(mlp_weights(1), canary={"x": X})
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


# ---------------------------------------------------------------- bad input


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


def test_a_rollback_does_not_wait_for_a_refit_being_staged(
    engine: onnx_refit.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.refit(mlp_weights(1))
    begun, go_on = threading.Event(), threading.Event()
    derive = type(engine._backend).derive

    def slow(*arguments: object, **named: object) -> object:
        begun.set()
        assert go_on.wait(30)
        return derive(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(engine._backend), "derive", slow)
        thread = threading.Thread(target=lambda: engine.stage(mlp_weights(2)).discard())
        thread.start()
        assert begun.wait(30)
        assert engine.rollback().version == 1
        assert answers(engine, mlp_weights(0))
        go_on.set()
        thread.join()


def test_unknown_keep_is_refused(plan: onnx_refit.Plan) -> None:
    with pytest.raises(EngineError, match="keep"):
        onnx_refit.load(plan, keep=0)


# ---------------------------------------------------------------- many threads


def test_no_answer_is_torn_while_refits_commit(plan: onnx_refit.Plan) -> None:
    sets = {seed: mlp_weights(seed) for seed in range(4)}
    expected = {seed: mlp_reference(weights, X) for seed, weights in sets.items()}
    torn: list[Array] = []
    done = threading.Event()
    with onnx_refit.load(plan) as engine:
        counts = [0] * 4

        def ask(index: int) -> None:
            while not done.is_set() or counts[index] < 50:
                result = engine.run({"x": X})["y"]
                counts[index] += 1
                if not any(np.allclose(result, wanted, rtol=1e-3, atol=1e-3) for wanted in expected.values()):
                    torn.append(result)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(200):
            engine.refit(sets[turn % 4])
        done.set()
        for thread in threads:
            thread.join()
        assert engine.version == 201
    assert not torn


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux shows them")
def test_no_file_is_left_open(engine: onnx_refit.Engine, tmp_path: Path) -> None:
    for seed in range(2):
        safetensors.numpy.save_file(mlp_weights(seed), tmp_path / f"{seed}.safetensors")
    bad = {**mlp_weights(3), "w1": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(bad, tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:-100])

    def cycle() -> None:
        engine.refit(tmp_path / "1.safetensors")
        engine.refit(tmp_path / "0.safetensors")
        for name in ("bad", "cut", "none"):
            with pytest.raises(OnnxRefitError):
                engine.refit(tmp_path / f"{name}.safetensors")

    cycle()
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        cycle()
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert answers(engine, mlp_weights(0))
