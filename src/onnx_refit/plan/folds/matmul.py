"""MatMul: a learned scalar in front of it goes into its weight, where no optimiser can take it for an attribute."""

from __future__ import annotations

import math

from onnx import NodeProto

from onnx_refit.plan.folds.framework import ABSENT
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.folds.site import Site, operator


class FoldScaleIntoMatMul:
    """``MatMul(x * s, W)`` or ``MatMul(x / s, W)``, s a weight of one element, becomes ``MatMul(x, W * s)``.

    Either operand may be the weight, and ``MatMul(W, x) * s`` is folded too. A constant s in front stays: it may be a
    part of a pattern that an optimiser looks for, and it does not change at a refit.
    """

    action = "fold the scalar into the weight of MatMul"
    anchors = frozenset({"MatMul", "Mul", "Div"})

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """A scaling node that only the MatMul reads, or that is the only reader of the MatMul."""
        if node.op_type == "MatMul":
            found = self._before(site, node)
            if found is None:
                return ABSENT
            scaling, _, weight, _ = found
            if weight is None:
                return "it scales a product of activations"
            if not site.read_once(scaling.output[0]):
                return f"the output of {scaling.name!r} is read by other nodes too"
        else:
            behind = self._behind(site, node)
            if behind is None:
                return ABSENT
            product, _, weight = behind
            if weight is None:
                return "it scales a product of activations"
            if not site.read_once(product.output[0]):
                return f"the output of {product.name!r} is read by other nodes too"
        return (
            f"the weight {weight!r} has other readers, and would be held twice" if self._shared(site, weight) else None
        )

    def call(self, site: Site, node: NodeProto) -> str:
        """Scale the weight, drop the scaling node."""
        if node.op_type == "MatMul":
            found = self._before(site, node)
            assert found is not None
            scaling, scalar, weight, place = found
            assert weight is not None
            factor = self._factor(site, scaling, scalar)
            value = scaling.input[1 - list(scaling.input).index(scalar)]
            site.remove(scaling)
            site.set_input(node, place, value)
            self._scale(site, node, weight, factor)
            return f"{scaling.name!r} was in front of it"
        behind = self._behind(site, node)
        assert behind is not None
        product, scalar, weight = behind
        assert weight is not None
        factor = self._factor(site, node, scalar)
        site.absorb(product, node)
        self._scale(site, product, weight, factor)
        return f"folded into {product.name!r}"

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """The pattern is gone."""
        if node.op_type != "MatMul":
            return "the node is still there" if site.alive(node) else None
        return None

    def _factor(self, site: Site, scaling: NodeProto, scalar: str) -> str:
        if scaling.op_type == "Mul":
            return scalar
        one = self._recipes.scalar(1.0, site.program.dtype(self._recipes.wide(scalar)))
        return self._recipes.binary("Div", one, scalar, f"{scalar}_inverse")

    def _scale(self, site: Site, product: NodeProto, weight: str, factor: str) -> None:
        shape = (1,) * len(site.program.shape(weight))
        scaled = self._recipes.scale(weight, self._recipes.reshape(factor, shape))
        site.set_input(product, list(product.input).index(weight), scaled)

    @staticmethod
    def _shared(site: Site, weight: str) -> bool:
        return len(site.readers(weight)) > 1

    @staticmethod
    def _before(site: Site, node: NodeProto) -> tuple[NodeProto, str, str | None, int] | None:
        """The scaling node in front, its scalar, the weight on the other side (or None), and the side it is on."""
        for place in (0, 1):
            scaling = site.maker(node.input[place])
            if scaling is None or operator(scaling) not in {"Mul", "Div"}:
                continue
            scalar = _scalar_weight(site, scaling)
            if scalar is None:
                continue
            other = node.input[1 - place]
            return scaling, scalar, other if _scalable(site, other) else None, place
        return None

    @staticmethod
    def _behind(site: Site, node: NodeProto) -> tuple[NodeProto, str, str | None] | None:
        """The MatMul behind which the scaling node stands, its scalar, and the MatMul's weight (or None)."""
        scalar = _scalar_weight(site, node)
        if scalar is None:
            return None
        product = site.maker(node.input[1 - list(node.input).index(scalar)])
        if product is None or operator(product) != "MatMul":
            return None
        return product, scalar, next((name for name in product.input if _scalable(site, name)), None)


def _scalable(site: Site, name: str) -> bool:
    return name in site.program and len(site.program.shape(name)) >= 1


def _scalar_weight(site: Site, node: NodeProto) -> str | None:
    """The one-element weight that a Mul or Div multiplies or divides by; it must not raise the rank of the other."""
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        name: str = node.input[index]
        other = node.input[1 - index]
        if not site.program.is_weight(name) or other in site.program:
            continue
        shape = site.program.shape(name)
        if math.prod(shape) == 1 and len(shape) <= max(1, site.rank(other) or 0):
            return name
    return None
