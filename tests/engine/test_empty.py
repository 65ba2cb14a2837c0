"""Requests in which a product has no rows: the answer that ONNX Runtime gives, or its refusal."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime import forms
from onnx_refit.engine.onnxruntime.backend import OnnxRuntimeBackend, create
from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.engine.onnxruntime.recurrence import deadly_extents, refuse_empty
from onnx_refit.engine.protocol import WeightSet
from onnx_refit.errors import EngineError
from onnx_refit.plan.compile import compile_model
from onnx_refit.tensors import Array, TensorSpec

from .compiled_by_hand import baked, random_like, relative_error, with_weights
from .test_models import _with
from .zoo import ZOO, ints, model, n, weight

SIZES = [(64, 64), (256, 128), (100, 37)]
SHAPES = [(0,), (0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 2, 3), (2, 3, 0), (2, 0, 3, 5), (0, 1, 1, 1)]


@pytest.fixture(autouse=True)
def _blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product is blocked, whatever a race on this host would say."""
    monkeypatch.setattr(forms.Forms, "prefer_blocked", lambda *_: True)


def backend_of(made: onnx.ModelProto) -> tuple[OnnxRuntimeBackend, dict[str, Array]]:
    compilation = compile_model(made)
    backend = create(compilation.compiled, compilation.weights, OnnxRuntimeOptions(threads=1))
    return backend, dict(compilation.weights)


def answer(made: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array] | None:
    """What ONNX Runtime answers, or None where it refuses."""
    try:
        results: list[Array] = baked(made).run(None, inputs)
    except Exception:  # noqa: BLE001  onnxruntime raises a dozen unrelated classes
        return None
    return results


def check(made: onnx.ModelProto, *requests: dict[str, Array]) -> OnnxRuntimeBackend:
    """Compare answers before and after a refit."""
    backend, weights = backend_of(made)
    first = backend.derive(weights)
    other = random_like(weights, 3)
    second = backend.derive(other, first)
    for inputs in requests:
        for weight_set, arrays in ((first, weights), (second, other)):
            wanted = answer(with_weights(made, arrays), inputs)
            assert wanted is not None
            for got, right in zip(backend.run(weight_set, inputs).values(), wanted, strict=True):
                assert (got.shape, got.dtype) == (right.shape, right.dtype)
                assert relative_error(got, right) < 1e-5
    return backend


def blocked_products(backend: OnnxRuntimeBackend) -> int:
    return sum(node.domain == NCHWC_DOMAIN and node.op_type == "Conv" for node in backend.graph.graph.node)


def x(*shape: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_products_of_any_rank(size: tuple[int, int], shape: tuple[int, ...]) -> None:
    k, columns = size
    w = [weight(np.random.default_rng(0), "w", k, columns)]
    made = model([n("MatMul", "x w", "y")], [("x", [*(f"d{i}" for i in range(len(shape))), k])], [("y", None)], w)
    backend = check(made, x(*shape, k), x(*(extent or 2 for extent in shape), k))
    assert blocked_products(backend) == 1
    backend.close()


@pytest.mark.parametrize("version", [9, 12, 13, 17])
def test_ranks_that_are_not_known_and_opsets(version: int) -> None:
    w = [weight(np.random.default_rng(0), "w", 36, 48)]
    made = model([n("Reshape", "x shape", "a"), n("MatMul", "a w", "y")], [("x", ["M", 36])], [("y", None)], w, version)
    made.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, ["R"]))
    # A zero in a Reshape takes over the extent at its place, so that the empty dimension is the first one here.
    shapes = [(0, 36), (0, 2, 36), (0, 1, 5, 36), (0, 1, 2, 3, 36)]
    requests = [{**x(0, 36), "shape": np.array(shape, np.int64)} for shape in shapes]
    backend = check(made, *requests, {**x(6, 36), "shape": np.array([1, 2, 1, 3, 36], np.int64)})
    assert blocked_products(backend) == 1
    backend.close()


@pytest.mark.parametrize("version", [7, 11, 17])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_gemm(size: tuple[int, int], transposed: int, version: int) -> None:
    k, columns = size
    rng = np.random.default_rng(0)
    w = [weight(rng, "w", *((columns, k) if transposed else (k, columns))), weight(rng, "b", columns)]
    made = model([n("Gemm", "x w b", "y", transB=transposed)], [("x", ["M", k])], [("y", ["M", columns])], w, version)
    check(made, x(0, k), x(3, k)).close()


@pytest.mark.parametrize(
    "node",
    [
        *(n(op_type, "b", "y") for op_type in ("Relu", "Tanh", "Sigmoid", "Elu", "Erf")),
        n("LeakyRelu", "b", "y", alpha=0.3),
        n("HardSigmoid", "b", "y", alpha=0.1, beta=0.4),
    ],
    ids=lambda node: node.op_type,
)
@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 0, 3)])
def test_bias_and_activation_behind(node: onnx.NodeProto, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    w = [weight(rng, "w", 36, 48), weight(rng, "b0", 48)]
    symbols = [f"d{i}" for i in range(len(shape))]
    made = model([n("MatMul", "x w", "a"), n("Add", "b0 a", "b"), node], [("x", [*symbols, 36])], [("y", None)], w)
    check(made, x(*shape, 36)).close()


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_several_products_with_and_without_rows_in_one_request(rank: int) -> None:
    """The plain products must be right, too: here the request has one with rows beside one without."""
    rng = np.random.default_rng(0)
    w = [weight(rng, "w0", 20, 37), weight(rng, "b0", 37), weight(rng, "w1", 37, 50), weight(rng, "w2", 20, 33)]
    nodes = [n("MatMul", "x w0", "a"), n("Add", "a b0", "b"), n("Sigmoid", "b", "c"), n("MatMul", "c w1", "y")]
    nodes += [n("MatMul", "z w2", "d"), n("LeakyRelu", "d", "y1", alpha=0.3)]
    symbols: list[int | str] = [f"d{i}" for i in range(rank - 1)]
    ends: list[tuple[str, list[int | str]]] = [("x", [*symbols, 20]), ("z", ["M", 20])]
    made = model(nodes, ends, [("y", None), ("y1", None)], w)
    some, none = (2, 3, 2)[: rank - 1], (0, 3, 2)[: rank - 1]
    backend = check(
        made,
        {**x(*none, 20), "z": x(5, 20)["x"]},
        {**x(*some, 20), "z": x(0, 20)["x"]},
        {**x(*none, 20), "z": x(0, 20)["x"]},
        {**x(*some, 20), "z": x(5, 20)["x"]},
    )
    assert blocked_products(backend) == 3
    backend.close()


def test_rows_that_a_model_selects() -> None:
    """Rows with a positive first element: there may be none of them in a request that is not empty."""
    rng = np.random.default_rng(0)
    w = [weight(rng, "w", 32, 48), weight(rng, "b", 48), ints("zero", 0)]
    nodes = [
        n("Gather", "x zero", "first", axis=1), n("Squeeze", "first axis", "flat"), n("Greater", "flat bound", "some"),
        n("Compress", "x some", "a", axis=0), n("MatMul", "a w", "c"), n("Add", "c b", "y"),
    ]  # fmt: skip
    w += [ints("axis", 1), onnx.numpy_helper.from_array(np.array(0, np.float32), "bound")]
    made = model(nodes, [("x", ["M", 32])], [("y", None)], w)
    absolute = np.abs(x(4, 32)["x"])
    check(made, {"x": -absolute}, {"x": absolute}, x(9, 32), x(0, 32)).close()


def test_products_in_branches() -> None:
    rng = np.random.default_rng(0)
    branch = helper.make_graph([n("MatMul", "x w", "t")], "b", [], [helper.make_tensor_value_info("t", 1, None)])
    nodes = [n("Greater", "s zero", "c"), helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    w = [weight(rng, "w", 16, 32), onnx.numpy_helper.from_array(np.array(0, np.float32), "zero")]
    made = model(nodes, [("x", ["M", 16]), ("s", [])], [("y", None)], w)
    one = np.array(1, np.float32)
    check(made, {**x(0, 16), "s": one}, {**x(0, 16), "s": np.array(-1, np.float32)}, {**x(3, 16), "s": one}).close()


def test_an_artefact_answers_too_and_what_is_wrong_stays_wrong() -> None:
    made = model(
        [n("MatMul", "x w", "y")], [("x", ["M", "K"])], [("y", None)], [weight(np.random.default_rng(0), "w", 64, 64)]
    )
    compilation = compile_model(made)
    first = create(compilation.compiled, compilation.weights, OnnxRuntimeOptions(threads=1))
    second = create(compilation.compiled, None, OnnxRuntimeOptions(threads=1), first.artefact())
    weights = second.derive(compilation.weights)
    assert second.run(weights, x(0, 64))["y"].shape == (0, 64)
    with pytest.raises(EngineError):
        second.run(weights, x(3, 60))
    assert second.run(weights, x(3, 64))["y"].shape == (3, 64)
    first.close()
    second.close()
    with pytest.raises(EngineError, match="closed"):
        second.run(weights, x(0, 64))


def compare(
    backend: OnnxRuntimeBackend, weights: WeightSet, inputs: dict[str, Array], wanted: list[Array] | None
) -> None:
    """The same answer, or a refusal where there is none."""
    if wanted is None:
        with pytest.raises(EngineError):
            backend.run(weights, inputs)
        return
    for got, right in zip(backend.run(weights, inputs).values(), wanted, strict=True):
        assert got.shape == right.shape
        assert relative_error(got, right) < 1e-5


@pytest.mark.parametrize("name", sorted(ZOO))
def test_whole_models_with_any_dimension_empty(name: str) -> None:
    """In both tiers: the same as ONNX Runtime, or refused by both."""
    made, inputs = ZOO[name]()
    backend, weights = backend_of(made)
    weight_set = backend.derive(weights)
    requests = []
    for value in made.graph.input:
        array = inputs[value.name]
        for axis, extent in enumerate(value.type.tensor_type.shape.dim):
            if extent.dim_param and value.name != "shape":
                shape = [0 if k == axis else size for k, size in enumerate(array.shape)]
                request = {**inputs, value.name: np.zeros(shape, array.dtype)}
                aborts = name == "gru" or (name == "lstm" and axis == 1)
                requests.append((request, None if aborts else answer(_with(made, weights), request)))
    for _ in range(2):
        for request, wanted in requests:
            compare(backend, weight_set, request, wanted)
        assert weight_set.full_speed.wait(60)
    backend.close()


def test_a_large_product_before_a_recurrence_in_both_tiers() -> None:
    """The second tier, too, has products that run blocked, with the weights baked in."""
    rng = np.random.default_rng(5)
    nodes = [n("MatMul", "x w0", "a"), n("LSTM", "a W R B", "b h", hidden_size=8), n("MatMul", "b w1", "y")]
    w = [weight(rng, "w0", 512, 1024), weight(rng, "W", 1, 32, 1024), weight(rng, "R", 1, 32, 8)]
    w += [weight(rng, "B", 1, 64), weight(rng, "w1", 8, 32)]
    made = model(nodes, [("x", ["T", "N", 512])], [("y", None), ("h", None)], w)
    backend, weights = backend_of(made)
    weight_set = backend.derive(weights)
    requests = [(x(*shape), answer(made, x(*shape))) for shape in [(0, 2, 512), (3, 2, 512)]]
    assert all(wanted is not None for _, wanted in requests)
    for _ in range(2):
        for request, wanted in requests:
            compare(backend, weight_set, request, wanted)
        with pytest.raises(EngineError, match="aborts"):
            backend.run(weight_set, x(3, 0, 512))
        assert weight_set.full_speed.wait(60)
    backend.close()


@pytest.mark.parametrize("shape", [["T", "N", 16], [None, None, 16], ["T", 2, 16], None])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_what_makes_a_recurrence_empty_is_found(kind: str, shape: list[int | str] | None) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    rng = np.random.default_rng(0)
    w = [weight(rng, "W", 1, gates * 8, 16), weight(rng, "R", 1, gates * 8, 8)]
    made = model([n("Relu", "x", "a"), n(kind, "a W R", "y", hidden_size=8)], [("x", ["T", "N", 16])], [("y", None)], w)
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
    found = deadly_extents(made, [TensorSpec("x", "float32", None if shape is None else tuple(shape))])
    named = shape is not None and shape[0] is not None
    wanted = {"RNN": [], "LSTM": [1], "GRU": [0, 1]}[kind]
    if kind != "RNN" and not named:
        wanted = [-1] if shape is None else [0, 1]
    if shape is not None and shape[1] == 2:
        wanted = [axis for axis in wanted if axis != 1]
    assert found == tuple(("x", axis) for axis in wanted)
    refused = {"x": np.zeros((0, 2, 16), np.float32)}
    if (("x", 0) in found) or (("x", -1) in found):
        with pytest.raises(EngineError, match="aborts"):
            refuse_empty(found, refused)
    else:
        refuse_empty(found, refused)


def test_an_error_in_the_model_names_no_temporary_file() -> None:
    rng = np.random.default_rng(0)
    nodes = [n("MatMul", "x w", "a"), n("Reshape", "a shape", "b"), n("Gemm", "b v", "y")]
    w = [weight(rng, "w", 64, 64), ints("shape", -1, 3, 3), weight(rng, "v", 9, 9)]
    compilation = compile_model(model(nodes, [("x", ["M", 64])], [("y", None)], w))
    with pytest.raises(EngineError, match="rank") as caught:
        create(compilation.compiled, compilation.weights)
    assert "/" not in str(caught.value)
    assert "model.onnx" not in str(caught.value)
