"""Find the matrix products of a graph that a blocked convolution can compute, with the bias and activation behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx import GraphProto, NodeProto

from onnx_refit.engine.onnxruntime.blocked import Matrix
from onnx_refit.model.graph import attribute, consumers
from onnx_refit.tensors import TensorSpec

_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm"})
# Activations that the blocked convolution applies itself -> its parameters' attribute names and defaults.
_ACTIVATIONS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": (("alpha", 0.01),),
    "HardSigmoid": (("alpha", 0.2), ("beta", 0.5)),
}

Prefer = Callable[[int, int, int | None], bool]
"""(K, N, M where known): whether the blocked form is at least as fast."""


@dataclass(frozen=True)
class Activation:
    """An activation applied by the convolution.

    Attributes:
        name: the operator.
        parameters: its parameters, in ONNX Runtime's order.
    """

    name: str
    parameters: tuple[float, ...]


@dataclass(frozen=True)
class Product:
    """A product to rewrite, with what follows it.

    Attributes:
        node: index of the product's node in its graph.
        absorbed: indexes of nodes that the rewritten product computes too.
        source: the left operand.
        matrix: the right operand.
        rank: rank of the left operand, None if unknown.
        bias: a weight of N elements added to it, or None.
        activation: applied last, or None.
        output: the value that the last absorbed node gave.
        then: an operator without parameters (Gelu) to apply after all, or None.
        alpha: a factor of the left operand.
    """

    node: int
    absorbed: tuple[int, ...]
    source: str
    matrix: Matrix
    rank: int | None
    bias: str | None
    activation: Activation | None
    output: str
    then: str | None = None
    alpha: float = 1.0


class Finder:
    """Finds the products of one graph.

    Args:
        graph: the graph.
        weights: its refittable weights.
        shapes: value -> shape where known (see ``shapes_of``).
        prefer: which sizes to rewrite.
    """

    def __init__(
        self,
        graph: GraphProto,
        weights: Mapping[str, TensorSpec],
        shapes: Mapping[str, tuple[int | str | None, ...]],
        prefer: Prefer,
    ) -> None:
        self._nodes = list(graph.node)
        self._index = {id(node): position for position, node in enumerate(graph.node)}
        self._consumers = consumers(graph)
        self._outputs = {value.name for value in graph.output}
        self._weights = weights
        self._shapes = shapes
        self._prefer = prefer
        dimensions = (d for value in graph.input for d in value.type.tensor_type.shape.dim)
        self._free = {d.dim_param for d in dimensions if d.dim_param}
        self._place = {node.output[0]: k for k, node in enumerate(graph.node) if node.output}

    def find(self) -> list[Product]:
        """The products worth rewriting, in the graph's order; no node is in two of them."""
        found = (self._product(position, node) for position, node in enumerate(self._nodes))
        return [product for product in found if product is not None]

    def _product(self, position: int, node: NodeProto) -> Product | None:
        if node.op_type not in _PRODUCTS or len(node.input) < 2:
            return None
        spec = self._weights.get(node.input[1])
        if spec is None or spec.dtype != "float32" or spec.shape is None or len(spec.shape) != 2:
            return None
        gemm = node.op_type.endswith("Gemm")
        if _altered(node, gemm):
            return None
        transposed = bool(attribute(node, "transB", 0))
        rows, columns = spec.static_shape[::-1] if transposed else spec.static_shape
        shape = self._shapes.get(node.input[0])
        rank = 2 if gemm else (None if shape is None else len(shape))
        if rank is not None and rank < 2:
            return None
        if shape and shape[-1] in self._free:
            # Nothing says that the caller's rows have the weight's length; a blocked product takes rows as they come,
            # and would cut them anew where a plain one refuses.
            return None
        if not rows or not self._prefer(rows, columns, _rows_of(shape)):
            return None
        bias: str | None = None
        if gemm and len(node.input) > 2 and node.input[2]:
            bias = node.input[2]
            if not self._is_bias(bias, columns):
                return None
        activation = _fused_activation(node)
        if node.op_type == "FusedGemm" and activation is None:
            return None
        matrix = Matrix(node.input[1], rows, columns, transposed)
        return self._extended(position, node, matrix, rank, bias, activation)

    def _extended(
        self,
        position: int,
        node: NodeProto,
        matrix: Matrix,
        rank: int | None,
        bias: str | None,
        activation: Activation | None,
    ) -> Product:
        absorbed: list[int] = []
        output, then = node.output[0], None
        if bias is None and activation is None:
            after = self._only_reader(output)
            if after is not None and after.op_type in {"Add", "BiasGelu"} and len(after.input) == 2:
                other = after.input[1] if after.input[0] == output else after.input[0]
                if self._is_bias(other, matrix.columns):
                    bias, output = other, after.output[0]
                    absorbed.append(self._place[output])
                    then = "Gelu" if after.op_type == "BiasGelu" else None
        if activation is None and then is None:
            after = self._only_reader(output)
            if after is not None and after.op_type in _ACTIVATIONS and not after.domain:
                parameters = tuple(float(attribute(after, k, d)) for k, d in _ACTIVATIONS[after.op_type])  # type: ignore[arg-type]
                activation, output = Activation(after.op_type, parameters), after.output[0]
                absorbed.append(self._place[output])
        alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
        return Product(position, tuple(absorbed), node.input[0], matrix, rank, bias, activation, output, then, alpha)

    def _is_bias(self, name: str, columns: int) -> bool:
        spec = self._weights.get(name)
        return (
            spec is not None
            and spec.dtype == "float32"
            and spec.size == columns
            and spec.static_shape[-1:] == (columns,)
            and len(spec.static_shape) <= 2
        )

    def _only_reader(self, name: str) -> NodeProto | None:
        readers = self._consumers.get(name, [])
        if len(readers) != 1 or name in self._outputs:
            return None
        # A reader through a sub-graph is the node that holds the sub-graph; it does not name the value itself.
        return readers[0] if list(readers[0].input).count(name) == 1 else None


def _altered(node: NodeProto, gemm: bool) -> bool:
    """Whether the product transposes its left operand or scales its bias."""
    scaled = gemm and len(node.input) > 2 and attribute(node, "beta", 1.0) != 1.0
    return scaled or any(attribute(node, flag, 0) for flag in ("transA", "transBatchA", "transBatchB"))


def _rows_of(shape: tuple[int | str | None, ...] | None) -> int | None:
    """M: the product of all dimensions but the last, where they are numbers."""
    if shape is None:
        return None
    rows = 1
    for extent in shape[:-1]:
        if not isinstance(extent, int):
            return None
        rows *= extent
    return rows


def _fused_activation(node: NodeProto) -> Activation | None:
    name = attribute(node, "activation")
    if not isinstance(name, bytes) or name.decode() not in _ACTIVATIONS:
        return None
    wanted = _ACTIVATIONS[name.decode()]
    values = [attribute(node, f"activation_{key}", default) for key, default in wanted]
    return Activation(name.decode(), tuple(float(v) for v in values))  # type: ignore[arg-type]


def shapes_of(graph: GraphProto) -> dict[str, tuple[int | str | None, ...]]:
    """The shapes that a graph declares for its values (ONNX Runtime writes what it inferred when it saves a graph)."""
    shapes: dict[str, tuple[int | str | None, ...]] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(
                int(d.dim_value) if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim
            )
    return shapes
