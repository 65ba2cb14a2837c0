"""What is put together before a graph runs, and what needs no work at a refit, judged on the CPU."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from onnx_refit.engine.cuda import family_code, upload  # noqa: E402
from onnx_refit.engine.cuda.arena import Layout  # noqa: E402
from onnx_refit.engine.cuda.families import body, formulas  # noqa: E402
from onnx_refit.engine.cuda.gather import Part, cut  # noqa: E402
from onnx_refit.engine.cuda.lowering import products  # noqa: E402
from onnx_refit.engine.cuda.lowering.drafts import Draft  # noqa: E402
from onnx_refit.engine.cuda.lowering.operators import Node  # noqa: E402
from onnx_refit.engine.cuda.lowering.pointwise import code, literal, walk_of  # noqa: E402
from onnx_refit.engine.cuda.lowering.program import Lowered  # noqa: E402
from onnx_refit.engine.cuda.plain import plain_weights  # noqa: E402
from onnx_refit.errors import EngineError  # noqa: E402
from onnx_refit.plan.compile import compile_model  # noqa: E402
from onnx_refit.plan.evaluate import evaluate  # noqa: E402
from onnx_refit.tensors import TensorSpec  # noqa: E402

from .models import make, mlp, random_like, weight  # noqa: E402
from .test_backend import made, rows, same, wanted  # noqa: E402

pytestmark = pytest.mark.torch


def kinds(model: onnx.ModelProto) -> list[str]:
    """The operators that a model's network runs, in order."""
    compiled = compile_model(model).compiled
    weights = {spec.name: spec.static_shape for spec in compiled.engine_weights}
    return [
        step.node.op_type for step in Lowered(compiled.activation, "cpu", weights=weights)._steps if not step.on_host
    ]


def answers(model: onnx.ModelProto, feeds: dict[str, Any], seed: int = 1) -> None:
    """The engine gives what ONNX Runtime gives, recorded and not."""
    backend, weights = made(model)
    named = {tensor.name for tensor in model.graph.initializer}
    values = {n: array if n in named else weights[n] for n, array in random_like(weights, seed).items()}
    held = backend.derive(values)
    for _ in range(3):
        got = backend.run(held, feeds)
        for spec, expected in zip(backend.outputs, wanted(model, values, feeds), strict=True):
            assert same(got[spec.name], expected)


def test_products_take_biases_and_relus_in() -> None:
    assert kinds(mlp()) == ["_Linear", "_Linear"]
    answers(mlp(), rows(3))


def attention(scale: tuple[int, ...] = ()) -> onnx.ModelProto:
    """Three projections of one input through transposed weights, scaled and multiplied."""
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("Transpose", [f"w{name}"], [f"t{name}"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", f"t{name}"], [f"p{name}"]),
            helper.make_node("Add", [f"p{name}", f"b{name}"], [name]),
        ]
    nodes += [
        helper.make_node("Constant", [], ["s"], value=onnx.numpy_helper.from_array(np.full(scale, 0.5, np.float32))),
        helper.make_node("Transpose", ["q"], ["q_as_it_is"], perm=[0, 1, 2]),
        helper.make_node("Mul", ["q_as_it_is", "s"], ["qs"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["qs", "kt"], ["pairs"]),
        helper.make_node("Softmax", ["pairs"], ["soft"], axis=-1),
        helper.make_node("MatMul", ["soft", "v"], ["y"]),
    ]
    tensors = {f"w{n}": weight(f"w{n}", 16, 8) for n in "qkv"} | {f"b{n}": weight(f"b{n}", 16) for n in "qkv"}
    return make(nodes, {"x": ["N", 5, 8]}, {"y": ["N", 5, 16]}, **tensors)


def test_projections_of_one_operand_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attention()
    assert "_Linears" in kinds(model)
    assert "_ScaledMatMul" in kinds(model)
    backend, weights = made(model)
    asked: list[tuple[int, ...]] = []
    real = products.product

    def noting(x: Any, w: Any, bias: Any = None, **options: Any) -> Any:
        asked.append(tuple(w.shape))
        return real(x, w, bias, **options)

    monkeypatch.setattr(products, "product", noting)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}
    held = backend.derive(weights)
    assert same(backend.run(held, feeds)["y"], wanted(model, weights, feeds)[0])
    assert asked == [(8, 48)]
    assert backend.recoverable == set(weights), "nothing is computed: the transposed weights are views"


@pytest.mark.parametrize("scale", [(), (1,), (16,)])
def test_scaled_products_of_a_model(scale: tuple[int, ...]) -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}
    answers(attention(scale), feeds)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 3)])
@pytest.mark.parametrize("leading", [(), (2,), (2, 5)])
def test_scaled_products(shape: tuple[int, ...], leading: tuple[int, ...]) -> None:
    """A factor that turns out to be no number scales its own operand."""
    a, b, factor = torch.randn(*leading, 4, 3), torch.randn(*leading, 3, 6), torch.rand(shape) + 1
    node = Node("_ScaledMatMul", "n", 17, 1, {"places": (0, 1)})
    got = products.scaled_matmul(node, a, b, factor, torch.tensor(2.0))
    torch.testing.assert_close(got, (a * factor) @ (b * 2))


def test_weights_that_are_not_side_by_side_are_multiplied_one_by_one() -> None:
    matrices = [torch.randn(4, 3) for _ in range(2)]
    assert products.side_by_side(matrices) is None
    whole = torch.randn(8, 3)
    found = products.side_by_side([whole[:4], whole[4:]])
    assert found is not None
    assert torch.equal(found, whole)
    assert products.side_by_side([whole[4:], whole[:4]]) is None


def elementwise() -> onnx.ModelProto:
    """A gelu, a clip and a residual in one chain; one value is read twice and one is an output."""
    number = onnx.numpy_helper.from_array
    return make(
        [
            helper.make_node("Constant", [], ["root"], value=number(np.array(1.41421356, np.float32))),
            helper.make_node("Constant", [], ["one"], value=number(np.array(1.0, np.float32))),
            helper.make_node("Constant", [], ["half"], value=number(np.array([0.5], np.float32))),
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Div", ["a", "root"], ["d"]),
            helper.make_node("Erf", ["d"], ["e"]),
            helper.make_node("Add", ["e", "one"], ["f"]),
            helper.make_node("Mul", ["a", "f"], ["g"]),
            helper.make_node("Mul", ["g", "half"], ["h"]),
            helper.make_node("Sigmoid", ["h"], ["z"]),
            helper.make_node("Clip", ["z", "half", "one"], ["i"]),
            helper.make_node("Sum", ["i", "x", "x"], ["y"]),
        ],
        {"x": ["N", 8]},
        {"y": ["N", 8], "z": ["N", 8]},
        b=weight("b", 8),
    )


def test_elementwise_operators_that_feed_each_other_are_joined() -> None:
    found = kinds(elementwise())
    assert found.count("_Pointwise") == 2, "what is an output ends a chain"
    assert "Erf" not in found
    answers(elementwise(), rows(3))


def test_a_convolutions_bias_joins_what_follows() -> None:
    model = make(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Add", ["r", "x"], ["y"]),
        ],
        {"x": ["N", 4, 6, 6]},
        {"y": ["N", 4, 6, 6]},
        w=weight("w", 4, 4, 3, 3),
        b=weight("b", 4),
    )
    assert kinds(model) == ["Conv", "_Channels", "_Pointwise"]
    answers(model, {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)})


shapes = st.lists(st.integers(1, 4), min_size=0, max_size=5)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, dropped=st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=3), permuted=st.booleans())
def test_walks_reach_every_element_of_every_operand(shape: list[int], dropped: list[set[int]], permuted: bool) -> None:
    """A walk's sizes and strides, as a kernel uses them, against PyTorch's broadcasting."""
    operands = [torch.arange(float(np.prod(shape))).reshape(shape)]
    for axes in dropped:
        own = [1 if axis in axes else size for axis, size in enumerate(shape)]
        tensor = torch.arange(float(np.prod(own))).reshape(own)
        operands.append(tensor.t() if permuted and tensor.dim() == 2 and own == own[::-1] else tensor)
    walk = walk_of([operand.shape for operand in operands], [operand.stride() for operand in operands])
    expected = torch.broadcast_tensors(*operands)
    if walk is None:
        assert len(shape) > 4
        return
    assert walk.shape == tuple(expected[0].shape)
    index = np.arange(int(np.prod(walk.sizes)))
    places = np.unravel_index(index, walk.sizes)
    for operand, strides, whole in zip(operands, walk.strides, expected, strict=True):
        at = sum(place * stride for place, stride in zip(places, strides, strict=True))
        memory = torch.as_strided(operand, (operand.numel(),), (1,)).numpy() if operand.numel() else np.empty(0)
        assert np.array_equal(memory[at], whole.reshape(-1).numpy())


def test_the_source_of_a_joined_kernel() -> None:
    members = (Draft("Mul", "m", ("x", "c"), ("t",)), Draft("Relu", "r", ("t",), ("u",)))
    node = Node("_Pointwise", "n", 17, 1, {"members": members, "leaves": ("x",), "scalars": {"c": 0.1}})
    text = code(node, (1,), 4)
    assert "const float r0 = (v0 * (1.000000015e-01f));" in text
    assert "float4" in text
    assert "float4" not in code(node, (1,), 1)


@given(st.floats(width=32))
def test_literals_are_exact(value: float) -> None:
    text = literal(value)
    if np.isfinite(value):
        assert np.float32(text.strip("()f")) == np.float32(value)
    else:
        assert "__int_as_float" in text


# ---------------------------------------------------------------------- refits


def normalised() -> onnx.ModelProto:
    """A convolution whose BatchNorm is folded at a refit, and a weight that is only transposed."""
    return make(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[1, 1]),
            helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], epsilon=1e-3),
            helper.make_node("GlobalAveragePool", ["n"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "head"], ["y"], transB=1, alpha=0.5),
        ],
        {"x": ["N", 3, 4, 4]},
        {"y": ["N", 2]},
        w=weight("w", 5, 3, 1, 1),
        g=weight("g", 5),
        b=weight("b", 5),
        m=weight("m", 5),
        v=onnx.numpy_helper.from_array(np.random.default_rng(0).uniform(0.5, 2, 5).astype(np.float32), "v"),
        head=weight("head", 2, 5),
    )


def test_formulas_give_what_the_program_gives() -> None:
    """The statements of each family, run by NumPy over the leaves' strides, bit for bit."""
    compilation = compile_model(normalised())
    compiled = compilation.compiled
    found = formulas(compiled)
    assert len(found) >= 2
    weights = {name: np.array(array) for name, array in compilation.weights.items()}
    expected = evaluate(compiled.program, weights)
    for name, formula in found.items():
        lines, leaves = body(formula)
        values: dict[str, Any] = {"sqrtf": np.sqrt, "expf": np.exp}
        for index, leaf in enumerate(leaves):
            source = torch.from_numpy(weights[leaf.source])
            values[f"v{index}"] = torch.as_strided(source, leaf.shape, leaf.strides).numpy()
        for line in lines:
            target, text = re.fullmatch(r"const float (\w+) = (.*);", line).groups()  # type: ignore[union-attr]
            values[target] = eval(re.sub(r"([\d.]+e[+-]\d+)f", r"np.float32(\1)", text), {"np": np}, values)
        assert np.array_equal(values["result"], expected[name]), name


def test_the_source_of_a_familys_kernel() -> None:
    formula = next(iter(formulas(compile_model(normalised()).compiled).values()))
    lines, leaves = body(formula)
    text = family_code.code(lines, [True] + [False] * (len(leaves) - 1), 2)
    assert text.count("__ldg(f1)") == 1, "what does not vary is read once"
    assert "load4(f0" in text


def test_formulas_that_a_kernel_cannot_write_stay_with_the_program() -> None:
    model = make(
        [
            helper.make_node("ReduceSum", ["w"], ["s"], keepdims=1),
            helper.make_node("Mul", ["w", "s"], ["t"]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        {"x": ["N", 8]},
        {"y": ["N", 4]},
        w=weight("w", 8, 4),
    )
    assert formulas(compile_model(model).compiled) == {}
    answers(model, rows(2))


def test_transposed_and_reshaped_weights_are_views_where_that_is_free() -> None:
    model = make(
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["a"]),
            helper.make_node("Transpose", ["u"], ["ut"], perm=[1, 0]),
            helper.make_node("Add", ["a", "ut"], ["y"]),
        ],
        {"x": [4, 8]},
        {"y": [4, 4]},
        w=weight("w", 4, 8),
        u=weight("u", 4, 4),
    )
    found = plain_weights(compile_model(model).compiled)
    assert {view.source for view in found.values()} == {"w"}, "an Add would read a transposed weight badly at each run"
    assert [view.strides for view in found.values()] == [(1, 8)]
    answers(model, {"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)})


def test_weights_read_as_one_matrix_lie_without_gaps() -> None:
    specs = [TensorSpec(name, "float32", (4, 3)) for name in "abcd"]
    slots = Layout(specs, torch.float32, {}, [("b", "d")]).slots
    assert slots["d"].offset == slots["b"].offset + slots["b"].nbytes
    assert slots["a"].offset % 256 == slots["b"].offset % 256 == slots["c"].offset % 256 == 0


def test_pieces_cover_every_byte_once() -> None:
    parts = [Part(torch.float32, (n,), 4 * n) for n in (1, 0, 20_000, 8192)]
    pieces = cut(parts, [(0, 0), (2, 256), (3, 100_000)])
    for index, to in ((0, 0), (2, 256), (3, 100_000)):
        mine = sorted((int(p["from"]), int(p["nbytes"]), int(p["to"])) for p in pieces if p["tensor"] == index)
        assert sum(nbytes for _, nbytes, _ in mine) == parts[index].nbytes
        assert all(place - begin == to for begin, _, place in mine)


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
def test_copies_by_several_threads_are_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_SPLIT", 100)
    monkeypatch.setattr(upload, "_THREADS", 3)
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    target = np.zeros(size + 7, np.uint8)
    upload._copy([(target[:size], source), (target[size:], np.arange(7, dtype=np.uint8))])
    assert np.array_equal(target[:size], source)
    assert target[size:].tolist() == list(range(7))


def test_bound_tensors_are_read_at_every_refit_and_refused_if_they_cannot_be() -> None:
    backend, weights = made(mlp())
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    bound = backend.bind(tensors)
    x = rows(2)
    for _ in range(2):
        for tensor in tensors.values():
            tensor.mul_(0.5)
        now = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
        assert same(backend.run(backend.derive(bound), x)["y"], wanted(mlp(), now, x)[0])
    with pytest.raises(EngineError, match="missing"):
        backend.bind({"w0": tensors["w0"]})
    with pytest.raises(EngineError, match="dense"):
        backend.bind({**tensors, "w1": torch.zeros(4, 16).t()})
    with pytest.raises(EngineError, match="takes"):
        backend.bind({**tensors, "b0": torch.zeros(3)})
