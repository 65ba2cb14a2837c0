"""Passes that take out what does nothing at inference: Dropout and Identity."""

from __future__ import annotations

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.model.edit import Builder, bypass, constant_of, copy_model, insert_before, label, replace_node
from onnx_refit.model.graph import consumers, reads
from onnx_refit.model.nodewise import NodeRewrite, Site
from onnx_refit.model.passes import Blocker, Change, PassResult, Rewrite
from onnx_refit.tensors import is_floating, onnx_dtype_name


class RemoveDropout(NodeRewrite):
    """Dropout hands its input on at inference."""

    name = "remove-dropout"
    operator = "Dropout"

    def rewrite(self, site: Site) -> list[Change | Blocker]:
        """Take one Dropout out, unless it trains."""
        node = site.node
        reason = _why_dropout_stays(site.model, site.graph, node, site.facts.opset)
        if reason is not None:
            return [Blocker(label(node), "Dropout", reason)]
        _remove_dropout(site.model, site.graph, node)
        return [Change(label(node), "Dropout", "taken out", "it does nothing at inference")]


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


class RemoveIdentity(NodeRewrite):
    """Identity hands its input on; readers read that input instead, so that weights keep their names."""

    name = "remove-identity"
    operator = "Identity"

    def rewrite(self, site: Site) -> list[Change]:
        """Take one Identity out, where its readers can read what it reads."""
        node = site.node
        change = Change(label(node), "Identity", "taken out", "it only hands a value on")
        return [change] if bypass(site.graph, node, node.input[0], node.output[0]) else []


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
