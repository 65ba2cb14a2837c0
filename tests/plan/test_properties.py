"""Random graphs of weight-only nodes, and random chains of folds, against ONNX's reference evaluator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.evaluate import affected, evaluate
from onnx_refit.tensors import Array
from tests.plan.support import array, assert_close, assert_contract, model, node, ops, random_weights, run, run_compiled

SLOWLY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Growing:
    """A graph of weight-only nodes while it grows: every value has its array, computed by NumPy along the way."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.constants: dict[str, Array] = {}
        self.values: dict[str, tuple[int, ...]] = {}

    def weight(self) -> None:
        shape = tuple(self.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        if math.prod(shape) == 1:
            shape = (*shape, 2)
        name = f"w{len(self.weights)}"
        self.weights[name] = array(len(self.weights), *shape)
        self.values[name] = shape

    def pick(self) -> str:
        return str(self.draw(st.sampled_from(sorted(self.values))))

    def ints(self, *numbers: int) -> str:
        name = f"i{len(self.constants)}"
        self.constants[name] = np.array(numbers, np.int64)
        return name

    def add(self, op_type: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> None:
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op_type, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        self.values[name] = shape

    def step(self) -> None:
        value = self.pick()
        shape = self.values[value]
        rank = len(shape)
        match self.draw(
            st.sampled_from(["transpose", "reshape", "slice", "concat", "gather", "mul", "neg", "shape", "pad"])
        ):
            case "transpose":
                order = self.draw(st.permutations(range(rank)))
                self.add("Transpose", [value], tuple(shape[i] for i in order), perm=list(order))
            case "reshape":
                new = self.draw(
                    st.sampled_from([(math.prod(shape),), (*shape, 1), (1, *shape), (shape[0], math.prod(shape[1:]))])
                )
                self.add("Reshape", [value, self.ints(*new)], tuple(new))
            case "slice":
                axis = self.draw(st.integers(0, rank - 1))
                stop = self.draw(st.integers(1, shape[axis]))
                start = self.draw(st.integers(0, stop - 1))
                inputs = [value, self.ints(start), self.ints(stop), self.ints(axis)]
                self.add("Slice", inputs, (*shape[:axis], stop - start, *shape[axis + 1 :]))
            case "concat":
                axis = self.draw(st.integers(0, rank - 1))
                self.add("Concat", [value, value], (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]), axis=axis)
            case "gather":
                axis = self.draw(st.integers(0, rank - 1))
                rows = self.draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=3))
                inputs = [value, self.ints(*rows)]
                self.add("Gather", inputs, (*shape[:axis], len(rows), *shape[axis + 1 :]), axis=axis)
            case "mul":
                other = self.pick()
                try:
                    joint = np.broadcast_shapes(shape, self.values[other])
                except ValueError:
                    return
                if math.prod(joint) <= 256:
                    self.add(self.draw(st.sampled_from(["Mul", "Add", "Sub"])), [value, other], tuple(joint))
            case "neg":
                self.add("Neg", [value], shape)
            case "pad":
                self.add("Pad", [value, self.ints(*([1] + [0] * (2 * rank - 1)))], (shape[0] + 1, *shape[1:]))
            case _:  # reshape to a shape read off another weight: w.reshape(Shape(w))
                target = f"s{len(self.nodes)}"
                self.nodes.append(node("Shape", [value], [target], name=f"n{len(self.nodes)}"))
                self.add("Reshape", [value, target], shape)


@st.composite
def weight_graphs(draw: Any) -> tuple[onnx.ModelProto, dict[str, Array]]:
    growing = Growing(draw)
    for _ in range(draw(st.integers(1, 3))):
        growing.weight()
    for _ in range(draw(st.integers(1, 8))):
        growing.step()
    wanted = draw(st.lists(st.sampled_from(sorted(growing.values)), min_size=1, max_size=3, unique=True))
    nodes, feeds, outputs = list(growing.nodes), {}, []
    for index, name in enumerate(wanted):
        feeds[f"x{index}"] = array(100 + index, *growing.values[name])
        nodes.append(node("Mul", [f"x{index}", name], [f"y{index}"], name=f"use{index}"))
        outputs.append(f"y{index}")
    shapes = {name: list(a.shape) for name, a in feeds.items()}
    return model(nodes, shapes, outputs, {**growing.weights, **growing.constants}), feeds


@SLOWLY
@given(weight_graphs())
def test_weight_only_graphs(case: tuple[onnx.ModelProto, dict[str, Array]]) -> None:
    proto, feeds = case
    compilation = compile_model(proto)
    compiled = compilation.compiled
    assert_contract(compilation)
    assert set(ops(compiled)) == {"Mul"}, "every weight-only node must leave the activation graph"
    weights = random_weights(compiled, 3)
    theirs = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, values in weights.items():
        theirs[name].CopyFrom(numpy_helper.from_array(values, name))
    expected = ReferenceEvaluator(proto).run(None, feeds)
    assert_close([np.asarray(e) for e in expected], run_compiled(compiled, weights, feeds), 1e-6)
    derived = evaluate(compiled.program, weights)
    for name, values in weights.items():
        changed = evaluate(compiled.program, {**weights, name: np.add(values, np.float32(1.5))})
        differing = {k for k in derived if not np.array_equal(derived[k], changed[k])}
        assert differing <= affected(compiled.program, {name})


HOSTS = ["Conv", "GroupConv", "ConvTranspose", "GroupConvTranspose", "MatMul", "Gemm"]
STEPS = ["Mul", "Add", "Sub", "Div", "BatchNormalization", "Relu"]
FORMS = ["scalar", "one", "channels", "full rank"]


@st.composite
def chains(draw: Any) -> tuple[onnx.ModelProto, dict[str, Array], list[str], bool]:
    host, bias = draw(st.sampled_from(HOSTS)), draw(st.booleans())
    steps = draw(
        st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(FORMS), st.booleans()), min_size=1, max_size=4)
    )
    channels, image = 6, host not in {"MatMul", "Gemm"}
    x = array(0, 2, 4, 5, 5) if image else array(0, 3, 4)
    shapes = {
        "Conv": (6, 4, 3, 3),
        "GroupConv": (6, 2, 3, 3),
        "ConvTranspose": (4, 6, 3, 3),
        "GroupConvTranspose": (4, 3, 3, 3),
        "MatMul": (4, 6),
        "Gemm": (4, 6),
    }
    weights: dict[str, Array] = {"w": array(1, *shapes[host])}
    attributes: dict[str, Any] = {"group": 2} if host.startswith("Group") else {}
    inputs = ["x", "w"]
    if bias and host != "MatMul":
        weights["b"] = array(2, channels)
        inputs.append("b")
    nodes = [node(host.removeprefix("Group"), inputs, ["h"], name="host", **attributes)]
    current, named = "h", []
    for index, (op_type, form, flip) in enumerate(steps):
        result = f"h{index}"
        if op_type == "Relu":
            nodes.append(node("Relu", [current], [result], name=f"s{index}"))
        elif op_type == "BatchNormalization":
            parts = [f"p{index}_{part}" for part in range(4)]
            for part, name in enumerate(parts):
                values = array(10 * index + part, channels)
                weights[name] = np.abs(values) + 0.5 if part == 3 else values
            nodes.append(node("BatchNormalization", [current, *parts], [result], name=f"s{index}"))
        else:
            spread = (channels, 1, 1) if image else (channels,)
            full = (1, channels, 1, 1) if image else (1, channels)
            shape = {"scalar": (), "one": (1,), "channels": spread, "full rank": full}[form]
            name = f"q{index}"
            weights[name] = np.asarray(np.abs(array(50 + index, *shape)) + 0.5, np.float32)
            if math.prod(shape) == 1:
                named.append(name)
            pair = [name, current] if flip and op_type in {"Mul", "Add"} else [current, name]
            nodes.append(node(op_type, pair, [result], name=f"s{index}"))
        current = result
    proto = model(nodes, {"x": list(x.shape)}, [current], weights, 15)
    return proto, {"x": x}, named, all(op_type != "Relu" for op_type, _, _ in steps)


@SLOWLY
@given(chains())
def test_chains_of_folds(case: tuple[onnx.ModelProto, dict[str, Array], list[str], bool]) -> None:
    proto, feeds, named, linear = case
    compilation = compile_model(proto, CompileOptions(refittable=tuple(named)))
    compiled = compilation.compiled
    assert_contract(compilation)
    host = proto.graph.node[0].op_type
    if linear:
        assert ops(compiled) in ([host], [host, "Add"])
    weights = {name: negated(name, values) for name, values in compilation.weights.items()}
    assert_close(reference(proto, feeds), run_compiled(compiled, compilation.weights, feeds), 1e-5)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    assert_close(reference(proto, feeds), run_compiled(compiled, weights, feeds), 1e-5)


def negated(name: str, values: Array) -> Array:
    """Other weights: variances (``p?_3``) and divisors (``q?``) stay positive."""
    changed = np.asarray(np.multiply(values, np.float32(-1.3)))
    return np.asarray(np.abs(changed)) if name[0] == "q" or name.endswith("_3") else changed


def reference(proto: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """ONNX's reference evaluator; ONNX Runtime for ConvTranspose of groups, which the evaluator gets wrong."""
    if any(n.op_type == "ConvTranspose" and n.attribute for n in proto.graph.node):
        return run(proto, feeds)
    return [np.asarray(result) for result in ReferenceEvaluator(proto).run(None, feeds)]
