"""BatchNormalization: folded into the affine operator before it, or brought to a form that optimisers leave alone."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnx_refit.model.graph import attribute, set_attribute
from onnx_refit.plan.folds.framework import ABSENT
from onnx_refit.plan.folds.hosts import Host, host_of, is_reduced, scale_host, set_bias
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.folds.site import Site, operator
from onnx_refit.tensors import numpy_dtype

_PATH = {"Reshape", "Transpose"}


def _parameters(node: NodeProto) -> list[str]:
    return list(node.input[1:5])


def _obstacle(site: Site, node: NodeProto) -> str | None:
    """Why a BatchNormalization (7, 9, 14, 15) cannot be touched, ABSENT where it has no weight, or None."""
    if not all(name in site.program for name in _parameters(node)):
        return ABSENT
    if attribute(node, "training_mode", 0) or any(node.output[1:]):
        return "it runs in training mode"
    if attribute(node, "spatial", 1) != 1:
        return "it normalises every position by itself (spatial=0)"
    return None


def _scale_and_shift(site: Site, recipes: Recipes, node: NodeProto, bias: str | None) -> tuple[str, str]:
    """``(scale / sqrt(variance + epsilon), (bias - mean) * that + shift)``, both ``[channels]``."""
    scale, shift, mean, variance = (recipes.wide(name) for name in _parameters(node))
    epsilon = attribute(node, "epsilon", 1e-5)
    assert isinstance(epsilon, float)
    small = recipes.scalar(epsilon, site.program.dtype(variance))
    name = node.name
    root = site.program.add(
        "Sqrt", [site.program.add("Add", [variance, small], f"{name}/variance")], f"{name}/deviation"
    )
    factor = recipes.binary("Div", scale, root, f"{name}/factor")
    if bias is None:
        return factor, recipes.binary("Sub", shift, recipes.binary("Mul", mean, factor, f"{name}/mean"), f"{name}/bias")
    centred = recipes.binary("Sub", bias, mean, f"{name}/centred")
    return factor, recipes.binary("Add", recipes.binary("Mul", centred, factor, f"{name}/moved"), shift, f"{name}/bias")


class FoldBatchNorm:
    """BatchNormalization behind Conv, ConvTranspose, Gemm or MatMul, directly or through Reshape and Transpose."""

    action = "fold BatchNormalization into the operator before it"
    anchors = frozenset({"BatchNormalization"})

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """An affine host, read by nothing else, whose channels are those of the BatchNormalization."""
        obstacle = _obstacle(site, node)
        if obstacle is not None:
            return obstacle
        found = _find(site, node)
        if found is None:
            return ABSENT
        host, path = found
        if not any(site.program.is_weight(name) for name in (*_parameters(node), host.weight, host.bias or "")):
            return ABSENT
        values = [host.output, *(step.output[0] for step in path)]
        if not all(site.read_once(value) for value in values):
            return f"the output of {host.bias_node.name!r} is read by other nodes too"
        if host.channels != site.program.shape(node.input[1])[0]:
            return f"{host.node.name!r} has {host.channels} channels"
        return None

    def call(self, site: Site, node: NodeProto) -> str:
        """Scale the weight, move the bias, drop the node."""
        found = _find(site, node)
        assert found is not None
        host, path = found
        factor, bias = _scale_and_shift(site, self._recipes, node, host.bias)
        last = path[0] if path else None
        output = node.output[0]
        scale_host(site, self._recipes, host, factor)
        site.remove(node)
        if last is not None:
            site.set_output(last, output)
            set_bias(site, self._recipes, host, bias)
        else:
            site.set_output(host.bias_node, output)
            set_bias(site, self._recipes, host, bias)
        return f"folded into {host.node.op_type} {host.node.name!r}"

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """The node is gone."""
        return "the node is still there" if site.alive(node) else None


def _find(site: Site, node: NodeProto) -> tuple[Host, list[NodeProto]] | None:
    """The host whose channel axis is the BatchNormalization's, and the nodes between them, the last one first."""
    path: list[NodeProto] = []
    value, axis = node.input[0], 1
    while True:
        host = host_of(site, value)
        if host is not None:
            place = _channel_axis(site, host)
            if path and host.node.op_type not in {"MatMul", "Gemm"}:
                return None
            return (host, path) if place == axis else None
        step = site.maker(value)
        before = None if step is None or operator(step) not in _PATH else _axis_before(site, step, axis)
        if step is None or before is None:
            return None
        path.append(step)
        value, axis = step.input[0], before


def _channel_axis(site: Site, host: Host) -> int | None:
    if host.axis >= 0:
        return host.axis
    rank = 2 if host.node.op_type == "Gemm" else site.rank(host.output)
    return None if rank is None else rank - 1


def _axis_before(site: Site, step: NodeProto, axis: int) -> int | None:
    """The axis of a Transpose's or Reshape's input that is the given one of its output; None where it is not one."""
    before, after = site.specs.get(step.input[0]), site.specs.get(step.output[0])
    if before is None or after is None or before.shape is None or after.shape is None:
        return None
    if step.op_type == "Transpose":
        order = attribute(step, "perm")
        places = list(order) if isinstance(order, (list, tuple)) else list(range(len(before.shape)))[::-1]
        return int(places[axis])
    last = before.shape[-1] if before.shape else None
    if axis == len(after.shape) - 1 and isinstance(last, int) and last == after.shape[-1]:
        return len(before.shape) - 1
    return None


class NormaliseBatchNorm:
    """A BatchNormalization that stands alone becomes scale and shift: mean 0, variance 1, epsilon 0.

    What an optimiser then computes from its values is the identity, bit for bit, whichever way it rewrites it.
    """

    action = "reduce BatchNormalization to scale and shift"
    anchors = frozenset({"BatchNormalization"})

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """At least one of its parameters is a weight, and it is not reduced yet."""
        obstacle = _obstacle(site, node)
        if obstacle is not None:
            return obstacle
        if not any(site.program.is_weight(name) for name in _parameters(node)) or is_reduced(site, node):
            return ABSENT
        return None

    def call(self, site: Site, node: NodeProto) -> str:
        """Replace its parameters."""
        factor, bias = _scale_and_shift(site, self._recipes, node, None)
        channels = site.program.shape(node.input[1])[0]
        kinds = [site.program.dtype(name) for name in _parameters(node)]
        zeros, ones = (np.full(channels, value, numpy_dtype(kinds[2])) for value in (0, 1))
        site.set_input(node, 1, self._recipes.cast(factor, kinds[0]))
        site.set_input(node, 2, self._recipes.cast(bias, kinds[1]))
        site.set_input(node, 3, self._recipes.constant(zeros, "mean_zero"))
        site.set_input(node, 4, self._recipes.constant(ones.astype(numpy_dtype(kinds[3])), "variance_one"))
        set_attribute(node, "epsilon", 0.0)
        return "no affine operator is before it"

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """It is reduced."""
        return None if is_reduced(site, node) else "mean and variance are still weights"
