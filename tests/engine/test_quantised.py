"""QDQ models run in the quantised kernels that a baked session takes, to the bit, whatever scales a refit brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.errors import RefitRejectedError
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import Verdict
from onnx_refit.plan.plan import Plan
from onnx_refit.tensors import Array

node = helper.make_node
LAYERS, CHANNELS = 3, 16
X_SCALES = [np.float32(0.03 + 0.004 * k) for k in range(LAYERS + 1)]
X = {"x": np.random.default_rng(9).standard_normal((2, CHANNELS, 9, 9)).astype(np.float32)}


def weights(seed: int, *, per_channel: bool) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for k in range(LAYERS):
        scale = rng.uniform(0.001, 0.004, CHANNELS if per_channel else ()).astype(np.float32)
        made[f"w{k}"] = rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
        made[f"ws{k}"] = np.asarray(scale)
        made[f"b{k}"] = rng.integers(-900, 900, CHANNELS).astype(np.int32)
        made[f"bs{k}"] = np.asarray(X_SCALES[k] * scale, np.float32)
    return made


def model(values: Mapping[str, Array]) -> onnx.ModelProto:
    """Three quantised Conv + Relu with quantised biases, as quantisers write them."""
    axis: dict[str, Any] = {"axis": 0} if values["ws0"].ndim else {}
    zeros = [CHANNELS] if axis else []
    held = {**values, "zx": np.uint8(128), "z": np.uint8(0), "zw": np.zeros(zeros, np.int8)}
    held |= {"zb": np.zeros(zeros, np.int32), **{f"s{k}": scale for k, scale in enumerate(X_SCALES)}}
    nodes = [node("QuantizeLinear", ["x", "s0", "zx"], ["q0"])]
    for k in range(LAYERS):
        nodes += [
            node("DequantizeLinear", [f"q{k}", f"s{k}", "z" if k else "zx"], [f"d{k}"]),
            node("DequantizeLinear", [f"w{k}", f"ws{k}", "zw"], [f"wd{k}"], **axis),
            node("DequantizeLinear", [f"b{k}", f"bs{k}", "zb"], [f"bd{k}"], **axis),
            node("Conv", [f"d{k}", f"wd{k}", f"bd{k}"], [f"c{k}"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", [f"c{k}"], [f"r{k}"]),
            node("QuantizeLinear", [f"r{k}", f"s{k + 1}", "z"], [f"q{k + 1}"]),
        ]
    nodes.append(node("DequantizeLinear", [f"q{LAYERS}", f"s{LAYERS}", "z"], ["y"]))
    shape: list[int | str] = ["N", CHANNELS, 9, 9]
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def baked(values: Mapping[str, Array]) -> Array:
    session = ort.InferenceSession(model(values).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, X)[0])


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_quantised_kernels_are_taken(per_channel: bool) -> None:
    compiled = compile_model(model(weights(0, per_channel=per_channel))).compiled
    backend = create(compiled)
    operators = [each.op_type for each in backend.graph.graph.node]
    assert operators.count("QLinearConv") == LAYERS
    assert "Conv" not in operators
    assert not [d for d in backend.decisions if d.action == "run this optimisation"]
    backend.close()


@pytest.mark.parametrize("per_channel", [True, False])
def test_refits_are_to_the_bit_those_of_a_baked_session(per_channel: bool) -> None:
    first = weights(0, per_channel=per_channel)
    with onnx_refit.load(onnx_refit.build(model(first))) as engine:
        assert np.array_equal(engine.run(X)["y"], baked(first))
        for seed in (1, 2, 3):
            other = weights(seed, per_channel=per_channel)
            engine.refit(other).full_speed.wait()
            assert np.array_equal(engine.run(X)["y"], baked(other))
        engine.rollback()
        assert np.array_equal(engine.run(X)["y"], baked(weights(2, per_channel=per_channel)))


def test_a_bias_scale_that_contradicts_the_others_is_refused(tmp_path: Path) -> None:
    plan = onnx_refit.build(model(weights(0, per_channel=True)))
    assert plan.compiled.derived["bs1"] == ("s1", "ws1")
    plan.save(tmp_path / "q.plan")
    reread = Plan.load(tmp_path / "q.plan")
    assert reread.compiled.derived == plan.compiled.derived
    other = weights(1, per_channel=True)
    with onnx_refit.load(reread) as engine:
        with pytest.raises(RefitRejectedError, match=r"bs1.* 's1' times 'ws1', and here it is not their product"):
            engine.refit({**other, "bs1": other["bs1"] * np.float32(1.001)})
        with pytest.raises(RefitRejectedError, match=r"bs1.*not given with it"):
            engine.refit({"b1": other["b1"], "bs1": other["bs1"]}, partial=True)
        assert engine.version == 1
        engine.refit({name: array for name, array in other.items() if not name.startswith("bs")})
        assert np.array_equal(engine.run(X)["y"], baked(other))


def test_a_bias_scale_of_its_own_is_a_weight_and_said_to_be() -> None:
    values = weights(0, per_channel=True)
    values["bs1"] = values["bs1"] * np.float32(1.5)
    plan = onnx_refit.build(model(values))
    assert "bs1" in plan.refittable
    assert "bs0" not in plan.refittable
    (decision,) = [d for d in plan.compiled.decisions if "not the product of the scales" in d.reason]
    assert decision.verdict is Verdict.REJECTED
    with onnx_refit.load(plan) as engine:
        assert np.array_equal(engine.run(X)["y"], baked(values))
