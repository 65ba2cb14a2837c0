"""Passes that take out what does nothing at inference: Dropout and Identity."""

from __future__ import annotations

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.model.edit import Builder, bypass, constant_of, copy_model, insert_before, is_onnx, label, replace_node
from onnx_refit.model.graph import all_graphs, consumers, opset, reads
from onnx_refit.model.passes import Blocker, Change, PassResult, Rewrite
from onnx_refit.tensors import is_floating, onnx_dtype_name


class RemoveDropout(Rewrite):
    """Dropout hands its input on at inference."""

    name = "remove-dropout"

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        graphs = list(all_graphs(model.graph))
        if not any(is_onnx(node, "Dropout") for graph in graphs for node in graph.node):
            return PassResult(model)
        copy = copy_model(model)
        version = opset(model) or 1
        changes: list[Change] = []
        blockers: list[Blocker] = []
        for graph in all_graphs(copy.graph):
            for node in list(graph.node):
                if is_onnx(node, "Dropout"):
                    reason = _why_dropout_stays(copy, graph, node, version)
                    if reason is not None:
                        blockers.append(Blocker(label(node), "Dropout", reason))
                        continue
                    _remove_dropout(copy, graph, node)
                    changes.append(Change(label(node), "Dropout", "taken out", "it does nothing at inference"))
        return PassResult(copy if changes else model, tuple(changes), tuple(blockers))


def _why_dropout_stays(model: ModelProto, graph: GraphProto, node: NodeProto, version: int) -> str | None:
    if version >= 12 and len(node.input) > 2 and node.input[2]:
        training = constant_of((graph, model.graph), node.input[2])
        if training is None:
            return "whether it trains is decided while the model runs"
        if bool(training.item()):
            return "it is in training mode"
    if version < 12 and _mask(graph, node):
        return f"its mask is used, whose content at inference opset {version} does not define"
    return None


def _mask(graph: GraphProto, node: NodeProto) -> str | None:
    """The name of the mask output, where something uses it."""
    if len(node.output) < 2 or not node.output[1]:
        return None
    used = node.output[1] in consumers(graph) or node.output[1] in {output.name for output in graph.output}
    return node.output[1] if used else None


def _remove_dropout(model: ModelProto, graph: GraphProto, node: NodeProto) -> None:
    mask = _mask(graph, node)
    if mask is not None:  # at inference nothing is dropped: the mask is true everywhere
        build = Builder(model, graph)
        shape = build.node("Shape", [node.input[0]])
        true = onnx.helper.make_tensor("true", onnx.TensorProto.BOOL, [1], [True])
        build.node("ConstantOfShape", [shape], name=f"{label(node)}_mask", output=mask, value=true)
        insert_before(graph, node, build.nodes)
    plain = onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name)
    replace_node(graph, node, [plain])
    bypass(graph, next(n for n in graph.node if n == plain), plain.input[0], plain.output[0])


class RemoveIdentity(Rewrite):
    """Identity hands its input on; readers read that input instead, so that weights keep their names."""

    name = "remove-identity"

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        graphs = list(all_graphs(model.graph))
        if not any(is_onnx(node, "Identity") for graph in graphs for node in graph.node):
            return PassResult(model)
        copy = copy_model(model)
        changes: list[Change] = []
        for graph in all_graphs(copy.graph):
            for node in list(graph.node):
                if is_onnx(node, "Identity"):
                    change = Change(label(node), "Identity", "taken out", "it only hands a value on")
                    if bypass(graph, node, node.input[0], node.output[0]):
                        changes.append(change)
        return PassResult(copy if changes else model, tuple(changes))


class RemoveUnusedConstants(Rewrite):
    """Constants that other passes left without a reader go; floating-point ones stay, as they may be weights."""

    name = "remove-unused-constants"

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        kept = {value.name for value in (*model.graph.input, *model.graph.output)}
        for node in model.graph.node:
            kept.update(reads(node))
        unused = {
            tensor.name
            for tensor in model.graph.initializer
            if tensor.name not in kept and not is_floating(onnx_dtype_name(tensor.data_type))
        }
        if not unused:
            return PassResult(model)
        copy = copy_model(model)
        for tensor in list(copy.graph.initializer):
            if tensor.name in unused:
                copy.graph.initializer.remove(tensor)
        return PassResult(
            copy, tuple(Change(name, "constant", "taken out", "nothing reads it") for name in sorted(unused))
        )
