"""Add, Sub, Mul and Div by weights: folded into the affine operator before them."""

from __future__ import annotations

import math

from onnx import NodeProto

from onnx_refit.plan.folds.framework import ABSENT
from onnx_refit.plan.folds.hosts import Host, host_of, output_rank, runs_along_channels, scale_host, set_bias
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.folds.site import Site


class FoldElementwise:
    """An element-wise operator (7 to the latest) by a weight or a constant, behind Conv, ConvTranspose, Gemm, MatMul.

    The operand may be one element, or run along the channels: ``[C, 1, 1]``, ``[1, C, 1, 1]``; ``[N]`` for products.
    """

    action = "fold the element-wise operator into the one before it"
    anchors = frozenset({"Add", "Sub", "Mul", "Div"})

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """An affine host, read by nothing else, and an operand that runs along its channels."""
        found = _match(site, node)
        if found is None:
            return ABSENT
        host, operand = found
        if not any(site.program.is_weight(name) for name in (operand, host.weight, host.bias or "")):
            return ABSENT
        if _is_cheap_constant(site, host, operand):
            return ABSENT
        if site.program.dtype(operand) != site.program.dtype(host.weight):
            return f"it has another dtype than the weight of {host.node.name!r}"
        if not site.read_once(host.output):
            return f"the output of {host.bias_node.name!r} is read by other nodes too"
        if not runs_along_channels(site, host, operand, output_rank(site, host)):
            return f"the operand does not run along the channels of {host.node.name!r}"
        product = host.node.op_type in {"MatMul", "Gemm"}
        if product and node.op_type in {"Mul", "Div"} and len(site.readers(host.weight)) > 1:
            return f"the weight of {host.node.name!r} has other readers, and would be held twice"
        return None

    def call(self, site: Site, node: NodeProto) -> str:
        """Scale weight and bias, or move the bias; drop the node."""
        found = _match(site, node)
        assert found is not None
        host, operand = found
        recipes, bias = self._recipes, host.bias
        site.absorb(host.bias_node, node)
        if node.op_type in {"Mul", "Div"}:
            factor = operand
            if node.op_type == "Div":
                one = recipes.scalar(1.0, site.program.dtype(recipes.wide(operand)))
                factor = recipes.binary("Div", one, operand, f"{operand}_inverse")
            flat = recipes.flat(factor)
            scale_host(site, recipes, host, flat)
            if bias is not None:
                set_bias(site, recipes, host, recipes.binary("Mul", bias, flat, f"{node.name}/bias"))
        else:
            moved = recipes.vector(operand, host.channels)
            if bias is not None:
                moved = recipes.binary(node.op_type, bias, moved, f"{node.name}/bias")
            elif node.op_type == "Sub":
                moved = site.program.add("Neg", [moved], f"{node.name}/bias")
            set_bias(site, recipes, host, moved)
        return f"folded into {host.node.op_type} {host.node.name!r}"

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """The node is gone."""
        return "the node is still there" if site.alive(node) else None


def _is_cheap_constant(site: Site, host: Host, operand: str) -> bool:
    """Whether it is one constant number behind a product with a bias: cheaper at inference than at each refit.

    Behind a MatMul without a bias it is folded: optimisers would make it an attribute of the MatMul.
    """
    product = host.node.op_type in {"MatMul", "Gemm"} and host.bias is not None
    return product and not site.program.is_weight(operand) and math.prod(site.program.shape(operand)) == 1


def _is_bias_already(site: Site, host: Host, node: NodeProto, operand: str) -> bool:
    """Whether the node adds a bias ``[N]``, or a constant, behind a bare MatMul: that is as it should be."""
    if host.node.op_type != "MatMul" or host.bias is not None or node.op_type not in {"Add", "Sub"}:
        return False
    if not site.program.is_weight(operand):
        return True
    return node.op_type == "Add" and site.program.shape(operand) == (host.channels,)


def _match(site: Site, node: NodeProto) -> tuple[Host, str] | None:
    """The host and the operand."""
    if len(node.input) != 2:
        return None
    for index in (1, 0) if node.op_type in {"Add", "Mul"} else (1,):
        operand, value = node.input[index], node.input[1 - index]
        if operand not in site.program or value in site.program:
            continue
        host = host_of(site, value)
        if host is None or _is_bias_already(site, host, node, operand):
            continue
        return host, operand
    return None
