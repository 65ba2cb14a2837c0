"""Affine hosts: operators that compute ``x * W + b``, into which a scale or a shift of their output can be folded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from onnx_refit.model.graph import attribute
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.folds.site import Site, operator
from onnx_refit.tensors import numpy_dtype


@dataclass(frozen=True)
class Host:
    """An operator whose weight is known to the program.

    Attributes:
        node: Conv, ConvTranspose, Gemm, MatMul or a reduced BatchNormalization; its input 1 is the weight.
        bias_node: the node that holds the bias: the node itself, or the Add behind a MatMul.
        bias_input: the input of ``bias_node`` that is the bias, or would be.
        channels: the size of the output axis that the bias runs along.
        axis: that axis; 1, or -1 for the last.
    """

    node: NodeProto
    bias_node: NodeProto
    bias_input: int
    channels: int
    axis: int

    @property
    def output(self) -> str:
        """The value it makes."""
        return str(self.bias_node.output[0])

    @property
    def weight(self) -> str:
        """Its weight."""
        return str(self.node.input[1])

    @property
    def bias(self) -> str | None:
        """Its bias, if it has one."""
        inputs = self.bias_node.input
        if self.bias_node is self.node and self.node.op_type == "MatMul":
            return None
        return inputs[self.bias_input] if len(inputs) > self.bias_input and inputs[self.bias_input] else None


def host_of(site: Site, value: str) -> Host | None:
    """The affine host that makes a value of this graph, or None."""
    node = site.maker(value)
    if node is None or node.domain:
        return None
    if node.op_type == "Add":
        return _matmul_with_bias(site, node)
    if len(node.input) < 2 or node.input[1] not in site.program:
        return None
    if any(name not in site.program for name in node.input[2:] if name):
        return None
    shape = site.program.shape(node.input[1])
    match node.op_type:
        case "Conv":
            return Host(node, node, 2, shape[0], 1)
        case "ConvTranspose":
            return Host(node, node, 2, shape[1] * _group(node), 1)
        case "Gemm":
            return _gemm(site, node, shape)
        case "BatchNormalization" if is_reduced(site, node):
            return Host(node, node, 2, shape[0], 1)
        case "MatMul" if len(shape) >= 2:
            return Host(node, node, 1, shape[-1], -1)
    return None


def _gemm(site: Site, node: NodeProto, shape: tuple[int, ...]) -> Host | None:
    """A normalised Gemm: alpha and beta one, the bias a vector."""
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return None
    channels = shape[0] if attribute(node, "transB", 0) else shape[1]
    if len(node.input) > 2 and node.input[2] and site.program.shape(node.input[2]) != (channels,):
        return None
    return Host(node, node, 2, channels, -1)


def _matmul_with_bias(site: Site, add: NodeProto) -> Host | None:
    for index in (0, 1):
        product, bias = add.input[1 - index], add.input[index]
        node = site.maker(product)
        if node is None or operator(node) != "MatMul" or not site.read_once(product) or bias not in site.program:
            continue
        if node.input[1] not in site.program or len(site.program.shape(node.input[1])) < 2:
            continue
        channels = site.program.shape(node.input[1])[-1]
        if site.program.shape(bias) == (channels,):
            return Host(node, add, index, channels, -1)
    return None


def _group(node: NodeProto) -> int:
    group = attribute(node, "group", 1)
    assert isinstance(group, int)
    return group


def runs_along_channels(site: Site, host: Host, value: str, rank: int | None) -> bool:
    """Whether a value of the program, broadcast to the host's output of that rank, changes along the channels only.

    One element does always, provided that it does not raise the rank.
    """
    shape = site.program.shape(value)
    if len(shape) > (rank if rank is not None else 1):
        return False
    if math.prod(shape) == 1:
        return True
    place = host.axis if host.axis < 0 else host.axis - (rank or 0)  # counted from the end
    return len(shape) >= -place and shape[place] == host.channels == math.prod(shape)


def output_rank(site: Site, host: Host) -> int | None:
    """The rank of the host's output: known from the weight for convolutions, from inference for products."""
    if host.node.op_type in {"Conv", "ConvTranspose"}:
        return len(site.program.shape(host.weight))
    return 2 if host.node.op_type == "Gemm" else site.rank(host.output)


def is_reduced(site: Site, node: NodeProto) -> bool:
    """Whether a BatchNormalization is scale and shift only: mean 0, variance 1, epsilon 0."""
    mean, variance = (site.program.constants.get(name) for name in node.input[3:5])
    plain = mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())
    return plain and attribute(node, "epsilon", 1e-5) == 0.0


def scale_host(site: Site, recipes: Recipes, host: Host, factor: str) -> None:
    """Multiply the host's weight by a factor of shape ``[channels]`` or of one element; the bias stays as it is."""
    site.set_input(host.node, 1, recipes.scale(host.weight, _shaped_factor(site, recipes, host, factor)))


def _shaped_factor(site: Site, recipes: Recipes, host: Host, factor: str) -> str:
    program, shape = site.program, site.program.shape(host.weight)
    if math.prod(program.shape(factor)) == 1:
        return recipes.reshape(factor, (1,) * len(shape))
    if host.node.op_type == "ConvTranspose" and _group(host.node) > 1:
        return _grouped_factor(recipes, factor, shape, _group(host.node))
    axis = {"Conv": 0, "ConvTranspose": 1}.get(host.node.op_type, len(shape) - 1)
    if host.node.op_type == "Gemm" and attribute(host.node, "transB", 0):
        axis = 0
    return recipes.reshape(factor, [host.channels if place == axis else 1 for place in range(len(shape))])


def _grouped_factor(recipes: Recipes, factor: str, shape: tuple[int, ...], group: int) -> str:
    """``[channels]`` -> ``[inputs, channels / group, 1, ...]``: the factor of each (input, output) pair of a group."""
    program = recipes.program
    wide = recipes.wide(factor)
    by_group = recipes.reshape(wide, (group, 1, shape[1]))
    ones = recipes.constant(np.ones((1, shape[0] // group, 1), numpy_dtype(program.dtype(wide))), "ones")
    spread = program.add("Mul", [by_group, ones], f"{factor}_spread")
    return recipes.reshape(spread, (shape[0], shape[1], *(1 for _ in shape[2:])))


def set_bias(site: Site, recipes: Recipes, host: Host, bias: str) -> None:
    """Give the host a bias of shape ``[channels]``, rounded to its weight's dtype; a bare MatMul gets an Add."""
    bias = recipes.cast(bias, site.program.dtype(host.weight))
    if host.node.op_type != "MatMul" or host.bias_node is not host.node:
        site.set_input(host.bias_node, host.bias_input, bias)
        return
    output = host.output
    product = site.draft.names.fresh(f"{output}_product")
    site.set_output(host.node, product)
    add = helper.make_node("Add", [product, bias], [output], name=site.draft.names.fresh(f"{host.node.name}/Add"))
    site.insert_after(host.node, add)
