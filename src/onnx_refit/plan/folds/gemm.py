"""Gemm: alpha goes into the weight, beta into the bias, and a bias that is a vector is held as one."""

from __future__ import annotations

import math

from onnx import NodeProto

from onnx_refit.model.graph import attribute, set_attribute
from onnx_refit.plan.folds.framework import ABSENT
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.folds.site import Site
from onnx_refit.tensors import is_floating


class NormaliseGemm:
    """Gemm (7 to the latest) with a weight: ``alpha = beta = 1``, bias ``[N]``. The transposes stay as they are."""

    action = "fold the scalars of Gemm into its weights"
    anchors = frozenset({"Gemm"})

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """Something to fold, and weights to fold it into."""
        operand, bias = _operand(site, node), _bias(node)
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        shaped = _vector_size(site, node) is not None
        if bias is None and beta != 1.0:
            beta = 1.0
        if alpha == 1.0 and beta == 1.0 and not shaped:
            return ABSENT
        weights = [name for name in (operand, bias) if name is not None and site.program.is_weight(name)]
        if not weights:
            return ABSENT
        if alpha != 1.0 and operand is None:
            return "alpha scales a product of activations"
        if beta != 1.0 and (bias is None or bias not in site.program):
            return "beta scales an activation"
        if not all(is_floating(site.program.dtype(name)) for name in weights):
            return "its weights are integers"
        return None

    def call(self, site: Site, node: NodeProto) -> str:
        """Rewrite weight and bias."""
        recipes, program = self._recipes, site.program
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        assert isinstance(alpha, float)
        assert isinstance(beta, float)
        done = []
        operand, bias = _operand(site, node), _bias(node)
        if alpha != 1.0 and operand is not None:
            factor = recipes.scalar(alpha, program.dtype(recipes.wide(operand)))
            shape = (1,) * len(program.shape(operand))
            scaled = recipes.scale(operand, recipes.reshape(factor, shape))
            site.set_input(node, list(node.input).index(operand), scaled)
            done.append(f"alpha {alpha:g}")
        if bias is not None and bias in program:
            kind = program.dtype(bias)
            size = _vector_size(site, node)
            if beta != 1.0:
                product = recipes.binary("Mul", bias, recipes.scalar(beta, "float32"), f"{node.name}/bias")
                bias = recipes.cast(product, kind)
                done.append(f"beta {beta:g}")
            if size is not None:
                bias = recipes.vector(bias, size)
                done.append("the bias as a vector")
            site.set_input(node, 2, bias)
        set_attribute(node, "alpha", 1.0)
        set_attribute(node, "beta", 1.0)
        return "folded " + " and ".join(done)

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """Nothing is left to fold."""
        return None if self.requires(site, node) == ABSENT else "scalars are left"


def _bias(node: NodeProto) -> str | None:
    return node.input[2] if len(node.input) > 2 and node.input[2] else None


def _operand(site: Site, node: NodeProto) -> str | None:
    """The factor of the product that takes alpha: B where it is a value of the program, else A, else None."""
    return next((node.input[index] for index in (1, 0) if node.input[index] in site.program), None)


def _vector_size(site: Site, node: NodeProto) -> int | None:
    """N, where the bias is a vector of N or one element in another shape than ``[N]``; None where it is fine."""
    bias = _bias(node)
    if bias is None or bias not in site.program or node.input[1] not in site.program:
        return None
    columns = site.program.shape(node.input[1])[0 if attribute(node, "transB", 0) else 1]
    shape = site.program.shape(bias)
    if shape == (columns,):
        return None
    along = math.prod(shape) == 1 or (math.prod(shape) == columns and shape[-1] == columns)
    return columns if along else None
