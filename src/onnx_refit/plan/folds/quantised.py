"""Quantised models: the scale of a bias is the product of two other scales, so it is computed and not stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto

from onnx_refit.plan.folds.framework import ABSENT
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.folds.site import Site, operator
from onnx_refit.tensors import Array

_ULPS = 4


class DeriveBiasScale:
    """Conv, ConvTranspose and Gemm of dequantised inputs: ``bias_scale = x_scale * weight_scale``.

    The quantised kernels assume it, and ONNX Runtime selects them only where it holds. The bias scale of the user's
    model is then no source weight: a new weight scale gives a new bias scale.

    Args:
        recipes: the recipes of this compilation.
        values: the first values of the source weights, which must hold to the rule, and constants.
    """

    action = "derive the scale of the bias"
    anchors = frozenset({"Conv", "ConvTranspose", "Gemm"})

    def __init__(self, recipes: Recipes, values: Mapping[str, Array]) -> None:
        self._recipes = recipes
        self._values = values

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """Three DequantizeLinear in front, a weight scale that is a weight, a bias scale that is the product."""
        scales = _scales(site, node)
        if scales is None:
            return ABSENT
        of_input, of_weight, of_bias, _ = scales
        if not site.program.is_weight(of_weight) or of_bias not in self._values:
            return ABSENT
        first = {**self._values, **site.program.constants}
        if of_input not in first or of_weight not in first:
            return "the scale of the input is computed at inference"
        product = np.asarray(first[of_input]) * np.asarray(first[of_weight])
        stored = first[of_bias]
        if product.size not in {1, stored.size}:
            return "the scales of weight and bias have different sizes"
        if not is_product(stored, first[of_input], first[of_weight]):
            return "it is not the product of the scales of input and weight"
        return None

    def call(self, site: Site, node: NodeProto) -> str:
        """Read the product instead of the stored scale."""
        scales = _scales(site, node)
        assert scales is not None
        of_input, of_weight, of_bias, dequantise = scales
        shape, kind = site.program.shape(of_bias), site.program.dtype(of_bias)
        product = self._recipes.binary("Mul", of_weight, of_input, f"{of_bias}_derived")
        sized = self._recipes.reshape(self._recipes.cast(product, kind), shape)
        site.set_input(dequantise, 1, sized)
        site.draft.derived[of_bias] = (of_input, of_weight)
        return f"it is {of_weight!r} times {of_input!r}"

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """The stored scale is not read here any more."""
        scales = _scales(site, node)
        return "the stored scale is still read" if scales is None or scales[2] in self._values else None


def _scales(site: Site, node: NodeProto) -> tuple[str, str, str, NodeProto] | None:
    """The scales of input, weight and bias, and the DequantizeLinear of the bias."""
    if len(node.input) < 3:
        return None
    makers = [site.maker(name) for name in node.input[:3]]
    found = [maker for maker in makers if maker is not None and operator(maker) == "DequantizeLinear"]
    if len(found) != 3 or found[2].input[0] not in site.program:
        return None
    return found[0].input[1], found[1].input[1], found[2].input[1], found[2]


def is_product(stored: Array, left: Array, right: Array) -> bool:
    """Whether a stored scale is the product of two, to a few units in the last place: another tool rounded it."""
    product = np.asarray(left) * np.asarray(right)
    if product.size not in {1, stored.size}:
        return False
    wide = np.broadcast_to(product.reshape(-1), stored.size).astype(np.float64)
    given = stored.reshape(-1).astype(np.float64)
    return bool((np.abs(wide - given) <= _ULPS * np.finfo(np.float32).eps * np.abs(given)).all())
