"""Every operator's lowering against the ONNX project's own node tests, and the placement of values."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the tensors are small; many threads on few cores wait for each other

from onnx_refit.engine.cuda.lowering.operators import OPERATORS, TORCH_DTYPES  # noqa: E402
from onnx_refit.engine.cuda.lowering.program import Lowered, supported_operators  # noqa: E402
from onnx_refit.errors import EngineError, ModelError, UnsupportedModelError  # noqa: E402
from onnx_refit.tensors import Array, onnx_dtype_name  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:index_reduce"),
]

# What the engine refuses, with the words it refuses with; everything else must agree with ONNX's expected outputs.
REFUSED = {
    "activations with parameters": ("test_lstm", "test_gru", "test_rnn"),
    "MaxPool with indices": ("test_maxpool",),
    "AveragePool with dilations": ("test_averagepool",),
    "over": ("test_maxpool", "test_averagepool", "test_conv"),
}


@functools.cache
def cases() -> dict[str, Any]:
    from onnx.backend.test.case.node import collect_testcases

    found: dict[str, Any] = {}
    for case in collect_testcases():
        model = case.model
        if model is None or not case.data_sets or len(model.graph.node) != 1:
            continue
        node = model.graph.node[0]
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            continue
        values = [*model.graph.input, *model.graph.output]
        if any(value.type.WhichOneof("value") != "tensor_type" for value in values):
            continue
        try:
            names = {onnx_dtype_name(value.type.tensor_type.elem_type) for value in values}
        except ModelError:
            continue
        if names <= set(TORCH_DTYPES) and "training" not in case.name:
            found[case.name] = case
    return found


def as_array(value: object) -> Array:
    if isinstance(value, TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value)


def to_torch(array: Array) -> object:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True)).reshape(array.shape)


def constants_where_the_host_needs_them(model: onnx.ModelProto, inputs: list[Array]) -> onnx.ModelProto:
    """The structural operands as initializers, as they are in exported models."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    node, graph = changed.graph.node[0], changed.graph
    host = {node.input[place] for place in OPERATORS[node.op_type].host if place < len(node.input)} - {""}
    given = {value.name: array for value, array in zip(model.graph.input, inputs, strict=True)}
    for value in list(graph.input):
        if value.name in host:
            graph.initializer.append(onnx.numpy_helper.from_array(given[value.name], value.name))
            graph.input.remove(value)
    return changed


def test_there_are_many_cases() -> None:
    """So that an empty collection cannot pass for success."""
    covered = {case.model.graph.node[0].op_type for case in cases().values()}
    assert len(cases()) > 500
    assert len(covered) > 100
    assert set(supported_operators()) - covered <= {"SimplifiedLayerNormalization", "Scatter"}


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operator_agrees_with_onnx(operator: str) -> None:
    failures = []
    for name, case in cases().items():
        model = case.model
        if model.graph.node[0].op_type != operator:
            continue
        for inputs, outputs in case.data_sets:
            arrays = [as_array(value) for value in inputs]
            for hosted in (True, False):
                try:
                    check(
                        constants_where_the_host_needs_them(model, arrays) if hosted else model, model, arrays, outputs
                    )
                except EngineError as error:
                    words = [
                        text for text, prefixes in REFUSED.items() if name.startswith(prefixes) and text in str(error)
                    ]
                    if not words:
                        failures.append(f"{name}: {error}")
                except AssertionError as error:
                    failures.append(f"{name}: {' '.join(str(error).split())[:300]}")
    assert not failures, "\n".join(failures)


def check(model: onnx.ModelProto, original: onnx.ModelProto, inputs: list[Array], outputs: list[Array]) -> None:
    lowered = Lowered(model, "cpu")
    values = {
        value.name: to_torch(array)
        for value, array in zip(original.graph.input, inputs, strict=True)
        if value.name in lowered.inputs
    }
    results = lowered.run(values)
    for name, wanted in zip(lowered.outputs, outputs, strict=True):
        got = results[name]
        wanted = as_array(wanted)
        assert tuple(got.shape) == wanted.shape, f"shape {tuple(got.shape)} instead of {wanted.shape}"
        found: Any = got.float().numpy() if got.dtype is torch.bfloat16 else got.numpy()
        expected: Any = wanted.astype(np.float32) if wanted.dtype.name == "bfloat16" else wanted
        assert found.dtype == expected.dtype, f"{found.dtype} instead of {expected.dtype}"
        # Some of ONNX's expected values are written with four digits.
        half = wanted.dtype.itemsize == 2
        np.testing.assert_allclose(found, expected, rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-4)


def small(
    nodes: list[onnx.NodeProto], initializers: dict[str, Array], output: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "M"])],
        [helper.make_tensor_value_info("y", output, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_what_only_decides_shapes_stays_on_the_host() -> None:
    """Shape -> Gather -> Concat -> Reshape, as every exporter writes it: nothing waits for the device."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["r"]),
        helper.make_node("ConstantOfShape", ["s"], ["ones"]),
        helper.make_node("Reshape", ["ones", "wanted"], ["o"]),
        helper.make_node("Add", ["r", "o"], ["y"]),
    ]
    model = small(nodes, {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1, 1])})
    lowered = Lowered(model, "cpu")
    assert lowered.graphable
    moved: dict[str, object] = {}
    x = torch.ones(2, 3)
    assert torch.equal(lowered.run({"x": x}, moved)["y"], torch.ones(2, 3, 1))
    assert set(moved) == {"o"}, "only what arithmetic on the device reads is moved there"
    held = moved["o"]
    lowered.run({"x": x}, moved)
    assert moved["o"] is held, "a second run for the same shapes moves nothing"


def test_what_depends_on_values_is_named_as_waiting() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"], name="places_of_x"),
        helper.make_node("Shape", ["places"], ["y"]),
    ]
    lowered = Lowered(small(nodes, {}, TensorProto.INT64), "cpu")
    assert not lowered.graphable
    assert lowered.waits_at == ["places_of_x (NonZero)"]
    assert lowered.run({"x": torch.eye(3)})["y"].tolist() == [2, 3]
    assert lowered.run({"x": torch.ones(2, 2)})["y"].tolist() == [2, 4]


def test_an_operator_without_lowering_is_named() -> None:
    nodes = [helper.make_node("Det", ["x"], ["y"], name="the_determinant")]
    with pytest.raises(UnsupportedModelError, match=r"the_determinant \(Det\)"):
        Lowered(small(nodes, {}), "cpu")


def test_half_precision_keeps_masks_finite() -> None:
    """A row that is masked whole must not become NaN."""
    nodes = [helper.make_node("Add", ["x", "mask"], ["a"]), helper.make_node("Softmax", ["a"], ["y"], axis=-1)]
    model = small(nodes, {"mask": np.full((1, 3), -3.4e38, np.float32)})
    y = Lowered(model, "cpu", torch.float16).run({"x": torch.zeros(2, 3, dtype=torch.float16)})["y"]
    assert y.dtype is torch.float16
    assert torch.isfinite(y).all()
