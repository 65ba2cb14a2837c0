"""Rewrite matrix products with refittable weights as blocked 1x1 convolutions, which need no prepacking.

``MatMul(x, W)`` becomes ``ReorderInput -> com.microsoft.nchwc.Conv -> ReorderOutput`` around views of x; the weight is
an input in blocked layout. Values stay blocked between products wherever nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, helper

from onnx_refit.engine.onnxruntime.blocked import blocked_matrix, padded_vector, up
from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN
from onnx_refit.engine.onnxruntime.products import Finder, Prefer, Product, shapes_of
from onnx_refit.model.graph import Names, all_graphs, captured, opset, producers, reads
from onnx_refit.plan.trace.recipes import Recipe
from onnx_refit.tensors import TensorSpec, value_info_of

NODE_PREFIX = "nchwc_node_"
"""How the names of the nodes begin that a rewrite makes."""
_MICROSOFT = "com.microsoft"
# Elementwise operators of one input, which know no layout.
_ELEMENTWISE = frozenset(
    {"Relu", "Tanh", "Sigmoid", "Gelu", "FastGelu", "QuickGelu", "Erf", "LeakyRelu", "HardSigmoid", "HardSwish", "Elu"}
    | {"Softplus", "Neg", "Abs", "Identity", "Mish", "Selu", "Softsign", "ThresholdedRelu"}
)


_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Rewritten:
    """A graph with blocked products.

    Attributes:
        model: the graph.
        recipes: its new weights, over the weights it had.
        count: how many products were rewritten.
    """

    model: onnx.ModelProto
    recipes: Mapping[str, Recipe]
    count: int


@dataclass(frozen=True)
class _Blocked:
    """A value in blocked layout: ``[1 or A, up(channels), B, C]`` and how to undo it."""

    name: str
    channels: int
    rank: int | None
    leading: str | None  # the plain value whose leading dimensions this one has


@dataclass
class _Rewriter:
    model: onnx.ModelProto
    weights: Mapping[str, TensorSpec]
    prefer: Prefer
    block: int
    names: Names
    recipes: dict[str, Recipe] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    made: dict[tuple[str, str], str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # small integer constants of the main graph
    count: int = 0

    def ints(self, *values: int) -> str:
        """The name of an int64 constant of the main graph."""
        key = ",".join(map(str, values))
        if key not in self.constants:
            name = self.names.fresh(f"nchwc_ints_{key}")
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
            self.constants[key] = name
        return self.constants[key]

    def scalar(self, value: float) -> str:
        """The name of a float32 constant of the main graph."""
        key = f"scalar {value!r}"
        if key not in self.constants:
            name = self.names.fresh("nchwc_scalar")
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
            self.constants[key] = name
        return self.constants[key]

    def weight(self, product: Product) -> str:
        """The blocked form of a product's matrix, as a graph input."""
        matrix = product.matrix
        key = (matrix.name, f"blocked{matrix.transposed}")
        if key not in self.made:
            name = self.names.fresh(f"{matrix.name}@blocked")
            self._declare(key, blocked_matrix(name, matrix, self.block))
        return self.made[key]

    def bias(self, product: Product) -> str:
        """The padded form of a product's bias, as a graph input; itself where it needs none."""
        assert product.bias is not None
        columns = product.matrix.columns
        if columns % self.block == 0 and len(self.weights[product.bias].static_shape) == 1:
            return product.bias
        key = (product.bias, "padded")
        if key not in self.made:
            self._declare(
                key, padded_vector(self.names.fresh(f"{product.bias}@padded"), product.bias, columns, self.block)
            )
        return self.made[key]

    def _declare(self, key: tuple[str, str], recipe: Recipe) -> None:
        self.recipes[recipe.spec.name] = recipe
        self.model.graph.input.append(value_info_of(recipe.spec))
        self.made[key] = recipe.spec.name

    def run(self) -> None:
        for tensor in self.model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1 and tensor.dims[0] <= 16:
                self.shapes[tensor.name] = tuple(int(x) for x in onnx.numpy_helper.to_array(tensor))
        for graph in all_graphs(self.model.graph):
            shapes = {**shapes_of(self.model.graph), **shapes_of(graph)}
            products = Finder(graph, self.weights, shapes, self.prefer).find()
            if products:
                _GraphRewriter(self, graph, products).run()
                self.count += len(products)


class _GraphRewriter:
    """Rewrites the products of one graph, in one pass over its nodes."""

    def __init__(self, shared: _Rewriter, graph: GraphProto, products: list[Product]) -> None:
        self._shared = shared
        self._graph = graph
        self._products = {product.node: product for product in products}
        self._absorbed = {position for product in products for position in product.absorbed}
        self._wanted = {product.source for product in products}
        self._blocked: dict[str, _Blocked] = {}
        self._raw: dict[str, str] = {}  # values reordered but not reshaped
        self._plain: set[str] = set()  # values that came out blocked and have been written plain too
        self._entries: dict[tuple[str, float, int], _Blocked] = {}
        self._nodes: list[NodeProto] = []
        self._producers = producers(graph)
        self._modern = (opset(shared.model) or 1) >= 13
        self._slices_shapes = (opset(shared.model) or 1) >= 15

    def run(self) -> None:
        for position, node in enumerate(list(self._graph.node)):
            if position in self._absorbed:
                continue
            product = self._products.get(position)
            if product is not None:
                self._rewrite(product)
            elif not self._kept_blocked(node) and not self._reshaped(node):
                for name in dict.fromkeys(reads(node)):
                    self._make_plain(name)
                self._nodes.append(node)
        for value in self._graph.output:
            self._make_plain(value.name)
        live = {value.name for value in self._graph.output}
        kept = []
        for node in reversed(self._nodes):
            if any(output in live for output in node.output):
                live.update(reads(node))
                kept.append(node)
        del self._graph.node[:]
        self._graph.node.extend(reversed(kept))

    def _emit(self, op_type: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        output = self._shared.names.fresh(f"nchwc_{op_type.lower()}")
        self._emit_as(output, op_type, inputs, domain, **attributes)
        return output

    def _emit_as(self, output: str, op_type: str, inputs: list[str], domain: str = "", **attributes: Any) -> None:
        name = self._shared.names.fresh(NODE_PREFIX + op_type)
        self._nodes.append(helper.make_node(op_type, inputs, [output], name=name, domain=domain, **attributes))

    def _rewrite(self, product: Product) -> None:
        entry = self._entry(product)
        inputs = [entry.name, self._shared.weight(product)]
        if product.bias is not None:
            inputs.append(self._shared.bias(product))
        attributes: dict[str, Any] = {"kernel_shape": [1, 1]}
        if product.activation is not None:
            attributes["activation"] = product.activation.name
            if product.activation.parameters:
                attributes["activation_params"] = list(product.activation.parameters)
        name = self._emit("Conv", inputs, NCHWC_DOMAIN, **attributes)
        if product.then is not None:
            name = self._emit(product.then, [name], _MICROSOFT)
        self._blocked[product.output] = _Blocked(name, product.matrix.columns, entry.rank, entry.leading)

    def _entry(self, product: Product) -> _Blocked:
        """The product's left operand in blocked layout."""
        source = self._behind_reshapes(product.source) if product.rank == 2 else product.source
        known = self._unpadded(source) if product.alpha == 1.0 else None
        if known is not None and (
            known.channels != product.matrix.rows or (source != product.source and known.rank != 2)
        ):
            known = None  # behind a reshape only another matrix has the same rows
        if known is not None and (known.rank == product.rank or product.rank is None or known.rank is None):
            return known
        rows = product.matrix.rows
        key = (source, product.alpha, rows)
        if key in self._entries:
            return self._entries[key]
        self._make_plain(source)
        value = source
        if product.alpha != 1.0:
            value = self._emit("Mul", [value, self._shared.scalar(product.alpha)])
        if product.rank == 3:
            value = self._axes("Unsqueeze", value, 0)
        elif product.rank != 4:
            value = self._emit("Reshape", [value, self._shared.ints(1, 1, -1, rows)])
        if rows % 4:
            value = self._padded(value, up(rows, 4) - rows)
        value = self._emit("ReorderInput", [value], NCHWC_DOMAIN, channels_last=1)
        entry = _Blocked(value, rows, product.rank, product.source if product.rank not in {2, 3, 4} else None)
        self._entries[key] = entry
        return entry

    def _unpadded(self, name: str) -> _Blocked | None:
        """A value in blocked layout that a product may read as it is.

        Not one with padded channels: an infinite input makes those NaN, and NaN times a weight of zero is NaN.
        """
        blocked = self._blocked.get(name)
        return None if blocked is None or blocked.channels % self._shared.block else blocked

    def _behind_reshapes(self, name: str) -> str:
        """The value that a matrix is a mere reshape of: it is about to be reshaped anyway."""
        producer = self._producers.get(name)
        while producer is not None and producer.op_type in _RESHAPES and not producer.domain:
            name = producer.input[0]
            producer = self._producers.get(name)
        return name

    def _reshaped(self, node: NodeProto) -> bool:
        """Let a Reshape to a constant shape read the reordered value as it comes, not reshaped to a matrix first."""
        if node.op_type != "Reshape" or node.domain or len(node.input) != 2:
            return False
        blocked = self._blocked.get(node.input[0])
        shape = self._shared.shapes.get(node.input[1])
        if blocked is None or blocked.rank != 2 or shape is None or 0 in shape or node.input[0] in self._plain:
            return False
        if node.input[0] not in self._raw:
            reorder: dict[str, Any] = {"channels": blocked.channels, "channels_last": 1}
            self._raw[node.input[0]] = self._emit("ReorderOutput", [blocked.name], NCHWC_DOMAIN, **reorder)
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[0] = self._raw[node.input[0]]
        self._nodes.append(copy)
        return True

    def _padded(self, value: str, missing: int) -> str:
        """A value of rank 4 with zeros behind its last dimension."""
        pads = (0, 0, 0, 0, 0, 0, 0, missing)
        if (opset(self._shared.model) or 1) >= 11:
            return self._emit("Pad", [value, self._shared.ints(*pads)])
        return self._emit("Pad", [value], pads=list(pads))

    def _axes(self, op_type: str, value: str, axis: int, output: str | None = None) -> str:
        inputs = [value, self._shared.ints(axis)] if self._modern else [value]
        attributes: dict[str, Any] = {} if self._modern else {"axes": [axis]}
        if output is None:
            return self._emit(op_type, inputs, **attributes)
        self._emit_as(output, op_type, inputs, **attributes)
        return output

    def _make_plain(self, name: str) -> None:
        """Write a blocked value in its ordinary layout, under its own name, once."""
        blocked = self._blocked.get(name)
        if blocked is None or name in self._plain:
            return
        self._plain.add(name)
        reorder: dict[str, Any] = {"channels": blocked.channels, "channels_last": 1}
        if blocked.rank == 4:
            self._emit_as(name, "ReorderOutput", [blocked.name], NCHWC_DOMAIN, **reorder)
            return
        value = self._emit("ReorderOutput", [blocked.name], NCHWC_DOMAIN, **reorder)
        if blocked.rank == 3:
            self._axes("Squeeze", value, 0, name)
        elif blocked.rank == 2:
            self._emit_as(name, "Reshape", [value, self._shared.ints(-1, blocked.channels)])
        else:
            assert blocked.leading is not None
            shape = self._leading_shape(blocked.leading)
            shape = self._emit("Concat", [shape, self._shared.ints(blocked.channels)], axis=0)
            self._emit_as(name, "Reshape", [value, shape])

    def _leading_shape(self, name: str) -> str:
        """The shape of a plain value without its last dimension."""
        if self._slices_shapes:
            return self._emit("Shape", [name], end=-1)
        shape = self._emit("Shape", [name])
        if (opset(self._shared.model) or 1) >= 10:
            return self._emit("Slice", [shape, self._shared.ints(0), self._shared.ints(-1)])
        return self._emit("Slice", [shape], starts=[0], ends=[-1])

    def _kept_blocked(self, node: NodeProto) -> bool:
        """Apply an elementwise operator to the blocked value, where a product reads the result."""
        if node.op_type not in _ELEMENTWISE or len(node.input) != 1 or len(node.output) != 1:
            return False
        source = self._unpadded(node.input[0])
        if source is None or node.output[0] not in self._wanted or any(captured(node)):
            return False
        copy = NodeProto()
        copy.CopyFrom(node)
        output = self._shared.names.fresh(f"{node.output[0]}@blocked")
        copy.input[:], copy.output[:] = [source.name], [output]
        self._nodes.append(copy)
        self._blocked[node.output[0]] = _Blocked(output, source.channels, source.rank, source.leading)
        return True


def rewrite(model: onnx.ModelProto, weights: Mapping[str, TensorSpec], prefer: Prefer, block: int) -> Rewritten:
    """The graph with its products by refittable matrices as blocked convolutions.

    Args:
        model: the graph; its weights are graph inputs.
        weights: those inputs.
        prefer: which sizes to rewrite.
        block: the host's block size.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    rewriter = _Rewriter(changed, weights, prefer, block, Names.of(changed.graph))
    rewriter.run()
    if rewriter.count:
        for domain in (NCHWC_DOMAIN, _MICROSOFT):
            if opset(changed, domain) is None:
                changed.opset_import.append(helper.make_opsetid(domain, 1))
        _drop_unread(changed.graph, weights)
    return Rewritten(changed, rewriter.recipes, rewriter.count)


def _drop_unread(graph: GraphProto, weights: Mapping[str, TensorSpec]) -> None:
    used = {name for node in graph.node for name in reads(node)} | {value.name for value in graph.output}
    kept = [value for value in graph.input if value.name in used or value.name not in weights]
    del graph.input[:]
    graph.input.extend(kept)
