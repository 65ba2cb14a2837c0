"""The choice of how a network runs, its record, and ONNX Runtime where the lowering lacks an operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")

import onnx_refit  # noqa: E402
from onnx_refit.engine.cuda import choice as choices  # noqa: E402
from onnx_refit.engine.cuda import inductor  # noqa: E402
from onnx_refit.engine.cuda.backend import CudaBackend  # noqa: E402
from onnx_refit.engine.cuda.choice import Choice, candidates, fastest, here, unpack  # noqa: E402
from onnx_refit.engine.cuda.create import choose, create, typical_input  # noqa: E402
from onnx_refit.engine.cuda.options import CudaOptions, Precision  # noqa: E402
from onnx_refit.engine.registry import EngineOptions  # noqa: E402
from onnx_refit.errors import EngineError, UnsupportedModelError  # noqa: E402
from onnx_refit.plan.compile import compile_model  # noqa: E402
from onnx_refit.tensors import TensorSpec  # noqa: E402

from .models import mlp, random_like, weight  # noqa: E402
from .test_backend import rows, same, wanted  # noqa: E402
from .test_recurrent import model as recurrent_model  # noqa: E402

pytestmark = pytest.mark.torch

CPU = CudaOptions(devices=("cpu",))


def with_det() -> onnx.ModelProto:
    """det(x @ w): PyTorch's lowering has no Det here, ONNX Runtime has."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Det", ["a"], ["y"], name="the_determinant")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [weight("w", 4, 4)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_an_operator_without_lowering_runs_in_onnx_runtime_and_refits_all_the_same() -> None:
    model = with_det()
    plan = onnx_refit.build(model, engine="cuda", options=onnx_refit.BuildOptions(engine=EngineOptions(cuda=CPU)))
    assert plan.weights is not None
    x = {"x": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)}
    with onnx_refit.load(plan, options=EngineOptions(cuda=CPU)) as engine:
        assert same(engine.run(x)["y"], wanted(model, dict(plan.weights), x)[0])
        other = random_like(dict(plan.weights), 3)
        engine.refit(other)
        assert same(engine.run(x)["y"], wanted(model, other, x)[0])
        assert any("onnxruntime" in decision.action for decision in engine.decisions)


def test_half_precision_is_not_offered_where_only_onnx_runtime_can() -> None:
    compiled = compile_model(with_det()).compiled
    with pytest.raises(UnsupportedModelError, match=r"the_determinant \(Det\)"):
        candidates(compiled, "cpu", CudaOptions(devices=("cpu",), precision=Precision.FP16))


def test_every_way_gives_the_same_answers() -> None:
    compilation = compile_model(mlp())
    ways = candidates(compilation.compiled, "cpu", CPU)
    assert [way.runner for way in ways] == ["torch", "onnxruntime"]
    x = rows(3)
    weights = {name: np.array(array) for name, array in compilation.weights.items()}
    for way in ways:
        backend = CudaBackend(compilation.compiled, "cpu", CPU, way)
        for values in (weights, random_like(weights, 1)):
            assert same(backend.run(backend.derive(values), x)["y"], wanted(mlp(), values, x)[0])


def test_traced_networks_see_new_weights_and_new_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchInductor's way with PyTorch's plain back end in place of its code generator."""
    monkeypatch.setattr(inductor, "COMPILER", "aot_eager")
    compilation = compile_model(mlp())
    options = CudaOptions(devices=("cpu",), inductor=True, graph_after=1)
    way = next(way for way in candidates(compilation.compiled, "cpu", options) if way.runner == "inductor")
    backend = CudaBackend(compilation.compiled, "cpu", options, way)
    weights = {name: np.array(array) for name, array in compilation.weights.items()}
    for values in (weights, random_like(weights, 1)):
        held = backend.derive(values)
        for count in (3, 5):
            x = rows(count)
            assert same(backend.run(held, x)["y"], wanted(mlp(), values, x)[0])
    assert len(backend.runner.recordings) == 2


def test_recurrent_networks_are_not_traced() -> None:
    proto, _ = recurrent_model("LSTM", "forward", ("b",))
    ways = candidates(compile_model(proto).compiled, "cpu", CudaOptions(devices=("cpu",), inductor=True))
    assert "inductor" not in [way.runner for way in ways]


def test_the_fastest_is_taken_and_what_fails_is_left_out() -> None:
    ways = [
        Choice("torch", "auto", "x", {}),
        Choice("torch", "library", "x", {}),
        Choice("onnxruntime", "auto", "x", {}),
    ]
    times = {"torch, recurrence auto": 3e-6, "torch, recurrence library": 2e-6}

    def timer(way: Choice) -> float:
        if way.label not in times:
            raise EngineError("it failed")
        return times[way.label]

    best = fastest(ways, timer)
    assert (best.runner, best.recurrent) == ("torch", "library")
    assert best.microseconds == {"torch, recurrence auto": 3.0, "torch, recurrence library": 2.0}
    times.clear()
    assert fastest(ways, timer) == ways[0]


def test_the_record_saves_the_measurement_on_the_same_kind_of_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = compile_model(mlp())
    timed: list[Any] = []

    def timing(call: Any, repeats: int = 15) -> float:
        timed.append(call())
        return float(len(timed))

    monkeypatch.setattr(choices, "time_inference", timing)
    backend, record = create(compilation.compiled, compilation.weights, CPU)
    backend.close()
    assert len(timed) == 2
    found = unpack(record, here("cpu", CPU))
    assert found is not None
    assert len(found.microseconds) == 2
    create(compilation.compiled, compilation.weights, CPU, record)
    assert len(timed) == 2, "the record is used"
    create(compilation.compiled, compilation.weights, CudaOptions(devices=("cpu",), precision=Precision.TF32), record)
    assert len(timed) == 4, "another precision is measured anew"
    assert unpack(record, "another GPU") is None
    assert unpack(b"rubbish", "") is None
    assert unpack(b'{"version": 1}', "") is None


def test_nothing_is_timed_without_weights_or_if_unwanted() -> None:
    compilation = compile_model(mlp())
    assert not choose(compilation.compiled, None, CPU).microseconds
    unwanted = CudaOptions(devices=("cpu",), measure=False)
    assert not choose(compilation.compiled, compilation.weights, unwanted).microseconds


def test_typical_inputs() -> None:
    spec = TensorSpec("x", "int64", ("N", 3, None))
    assert typical_input(spec, {"N": 7}).shape == (7, 3, 32)
    assert typical_input(spec, {}).dtype == np.int64
