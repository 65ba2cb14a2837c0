"""Models of many weights: partial refits, rollbacks and versions of any order answer like fresh sessions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit.tensors import Array

WIDTH = 24
LAYERS = 14
X = np.random.default_rng(3).standard_normal((1, WIDTH, 5, 5)).astype(np.float32)


def weights_of(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for layer in range(LAYERS):
        made[f"w{layer}"] = rng.normal(0, 0.25, (WIDTH, WIDTH, 1, 1)).astype(np.float32)
        for name, low, high in (("scale", 0.5, 1.5), ("shift", -1.0, 1.0), ("mean", -0.5, 0.5), ("var", 0.5, 2.0)):
            made[f"{name}{layer}"] = rng.uniform(low, high, WIDTH).astype(np.float32)
    made["last"] = rng.normal(0, 0.25, (WIDTH * 25, 600)).astype(np.float32)  # too large for the packet of small ones
    made["bias"] = rng.normal(0, 0.25, 600).astype(np.float32)
    return made


def model_of(weights: dict[str, Array]) -> onnx.ModelProto:
    nodes, value = [], "x"
    for k in range(LAYERS):
        nodes += [
            helper.make_node("Conv", [value, f"w{k}"], [f"c{k}"], name=f"conv{k}"),
            helper.make_node(
                "BatchNormalization", [f"c{k}", *(f"{n}{k}" for n in ("scale", "shift", "mean", "var"))], [f"n{k}"]
            ),
            helper.make_node("Relu", [f"n{k}"], [f"v{k}"]),
        ]
        value = f"v{k}"
    nodes += [
        helper.make_node("Flatten", [value], ["flat"]),
        helper.make_node("Gemm", ["flat", "last", "bias"], ["y"], name="gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "many",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 600])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def plan() -> onnx_refit.Plan:
    return onnx_refit.build(model_of(weights_of(0)))


@pytest.fixture
def engine(plan: onnx_refit.Plan) -> Iterator[onnx_refit.Engine]:
    with onnx_refit.load(plan, keep=4) as loaded:
        yield loaded


def require_answers(engine: onnx_refit.Engine, weights: dict[str, Array], version: int | None = None) -> None:
    """The version holds these weights bit for bit, and answers like a session baked from them."""
    source = engine.weights(version)
    for name, array in weights.items():
        assert source.read(name).tobytes() == array.tobytes(), name
    wanted = ort.InferenceSession(model_of(weights).SerializeToString()).run(None, {"x": X})[0]
    got = engine.run({"x": X}, version=version)["y"]
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_refits_and_rollbacks(engine: onnx_refit.Engine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    held = {engine.version: weights_of(0)}
    for turn in range(12):
        current = held[engine.version]
        other = weights_of(100 * seed + turn + 1)
        names = sorted(current)
        if turn % 5 == 4:
            report = engine.refit(other)
            changed = other
            assert set(report.changed) == set(names)
        else:
            count = int(rng.integers(1, 5)) if turn % 2 else 1
            chosen = rng.choice(names, count, replace=False).tolist()
            same = set(chosen[1:2])  # given, and as it was
            given = {name: current[name].copy() if name in same else other[name] for name in chosen}
            report = engine.refit(given, partial=True)
            changed = {**current, **given}
            assert set(report.changed) == set(chosen) - same
            assert set(report.unchanged) == set(names) - set(report.changed)
            assert report.nbytes == sum(current[name].nbytes for name in report.changed)
            assert report.check is not None
            assert [one.name for one in report.check.accepted] == [n for n in engine.refittable if n in given]
            assert {one.name for one in report.check.missing} == set(names) - set(given)
        held[report.version] = changed
        require_answers(engine, changed)
        if turn % 4 == 3:
            engine.rollback()
            require_answers(engine, held[engine.version])
        for info in engine.versions:
            if info.held:
                require_answers(engine, held[info.number], info.number)


def test_it_does_not_matter_in_how_many_steps_weights_came(plan: onnx_refit.Plan) -> None:
    """What a partial refit computes of few weights is to the bit what a refit of all computes of them."""
    wanted = weights_of(9)
    names = sorted(wanted)
    with onnx_refit.load(plan) as whole, onnx_refit.load(plan) as parts:
        whole.refit(wanted)
        for begin in range(0, len(names), 3):
            parts.refit({name: wanted[name] for name in names[begin : begin + 3]}, partial=True)
        assert whole.run({"x": X})["y"].tobytes() == parts.run({"x": X})["y"].tobytes()
        assert whole.fingerprint() == parts.fingerprint()


def test_versions_share_what_does_not_change(engine: onnx_refit.Engine) -> None:
    """A change of one small weight shares all buffers but the few that read it; of none, all."""
    current = weights_of(0)
    given = {"shift3": weights_of(1)["shift3"]}
    engine.refit(given, partial=True)
    info = engine.versions[-1]
    assert info.nbytes - info.shared_nbytes <= 4 * WIDTH * (WIDTH + 4)
    assert info.nbytes >= sum(array.nbytes for name, array in current.items() if name[:4] in {"last", "bias"})
    engine.refit({"shift3": given["shift3"].copy()}, partial=True)
    info = engine.versions[-1]
    assert info.changed == frozenset()
    assert info.shared_nbytes == info.nbytes
    require_answers(engine, {**current, **given})


def test_a_partial_refit_of_everything_is_whole(engine: onnx_refit.Engine) -> None:
    report = engine.refit(weights_of(5), partial=True)
    assert len(report.changed) == len(engine.refittable)
    assert engine.versions[-1].shared_nbytes == 0
    require_answers(engine, weights_of(5))
