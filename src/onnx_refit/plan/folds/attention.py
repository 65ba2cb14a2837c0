"""com.microsoft.Attention: its merged projection becomes a MatMul of its own, which backends know how to refit."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from onnx_refit.model.graph import attribute
from onnx_refit.plan.folds.framework import ABSENT
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.folds.site import Site

_KEPT = ("num_heads", "scale", "mask_filter_value", "unidirectional")


class SplitAttention:
    """Attention (com.microsoft 1) becomes MatMul + Add + Split + MultiHeadAttention (com.microsoft 1)."""

    action = "split the projection off Attention"
    anchors = frozenset({"com.microsoft.Attention"})

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """Weights that are weights, no past, no rotary embedding, a mask that MultiHeadAttention takes."""
        if len(node.input) < 2 or not site.program.is_weight(node.input[1]):
            return ABSENT
        inputs = dict(enumerate(node.input))
        if inputs.get(4) or inputs.get(6) or len([output for output in node.output if output]) > 1:
            return "it keeps past keys and values"
        if attribute(node, "do_rotary", 0):
            return "it embeds positions by rotation"
        if inputs.get(2) and inputs[2] not in site.program:
            return "its bias is computed at inference"
        if inputs.get(3):
            return _mask_obstacle(site, inputs[3])
        return None

    def call(self, site: Site, node: NodeProto) -> str:
        """Put the four nodes in its place."""
        names = site.draft.names
        inputs = dict(enumerate(node.input))
        sizes = _sizes(site, node)
        stem = node.name
        value = names.fresh(f"{stem}/projected")
        new = [helper.make_node("MatMul", [node.input[0], node.input[1]], [value], name=names.fresh(f"{stem}/MatMul"))]
        if inputs.get(2):
            biased = names.fresh(f"{stem}/biased")
            new.append(helper.make_node("Add", [value, inputs[2]], [biased], name=names.fresh(f"{stem}/Add")))
            value = biased
        parts = [names.fresh(f"{stem}/{part}") for part in ("query", "key", "value")]
        if site.draft.opset >= 13:
            split = self._recipes.constant(np.array(sizes, np.int64), f"{stem}/sizes")
            new.append(helper.make_node("Split", [value, split], parts, name=names.fresh(f"{stem}/Split"), axis=2))
        else:
            new.append(
                helper.make_node("Split", [value], parts, name=names.fresh(f"{stem}/Split"), axis=2, split=sizes)
            )
        heads = helper.make_node(
            "MultiHeadAttention",
            [*parts, "", inputs.get(3, ""), inputs.get(5, "")],
            [node.output[0]],
            name=names.fresh(f"{stem}/MultiHeadAttention"),
            domain="com.microsoft",
        )
        heads.attribute.extend(setting for setting in node.attribute if setting.name in _KEPT)
        while heads.input[-1] == "":
            del heads.input[-1]
        site.replace(node, [*new, heads])
        return "the projection is a MatMul"

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """The node is gone."""
        return "the node is still there" if site.alive(node) else None


def _sizes(site: Site, node: NodeProto) -> list[int]:
    sizes = attribute(node, "qkv_hidden_sizes")
    if isinstance(sizes, (list, tuple)) and sizes:
        return [int(size) for size in sizes]
    return [site.program.shape(node.input[1])[1] // 3] * 3


def _mask_obstacle(site: Site, mask: str) -> str | None:
    """Why MultiHeadAttention does not take the mask: it knows ``[B]``, ``[3B+2]``, ``[B, T]`` and ``[B, S, T]``."""
    spec = site.specs.get(mask)
    if spec is None or spec.shape is None:
        return "the rank of its mask is not known"
    if len(spec.shape) in {2, 3}:
        return None
    return f"its mask has rank {len(spec.shape)}"
