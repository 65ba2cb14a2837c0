"""Operators that reduce and normalise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from onnx_refit.engine.cuda.lowering.operators import Node, Tensor, ints, operator


def _extreme(x: Tensor, axes: list[int], keep: bool, *, largest: bool) -> Tensor:
    """The largest or smallest element; over nothing the number that changes no comparison."""
    if all(x.shape[axis] for axis in axes):
        return x.amax(axes, keepdim=keep) if largest else x.amin(axes, keepdim=keep)
    if x.dtype is torch.bool:
        neutral: Any = not largest
    elif x.is_floating_point():
        neutral = -torch.inf if largest else torch.inf
    else:
        neutral = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keep or axis not in axes]
    return torch.full(sizes, neutral, dtype=x.dtype, device=x.device)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, largest=True),
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, largest=False),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep, dtype=x.dtype).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


@operator(*_REDUCTIONS, host=(1,))
def reduce_(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Reduce over axes; over all if none are given, unless told to do nothing then."""
    chosen = ints(axes) if axes is not None else list(node.get("axes") or [])
    if not chosen:
        if node.get("noop_with_empty_axes", 0):
            return x
        chosen = list(range(x.dim()))
    if not x.dim():
        return _REDUCTIONS[node.op_type](x.reshape(1), [0], False)
    return _REDUCTIONS[node.op_type](x, [axis % x.dim() for axis in chosen], bool(node.get("keepdims", 1)))


@operator("ReduceProd", host=(1,))
def reduce_product(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Multiply over axes (PyTorch takes one at a time)."""
    chosen = ints(axes) if axes is not None else list(node.get("axes") or [])
    if not chosen:
        if node.get("noop_with_empty_axes", 0):
            return x
        chosen = list(range(x.dim()))
    for axis in sorted((axis % x.dim() for axis in chosen), reverse=True):
        x = x.prod(axis, keepdim=bool(node.get("keepdims", 1)), dtype=x.dtype)
    return x


def _hardmax(x: Tensor, axis: int) -> Tensor:
    first = (x == x.amax(axis, keepdim=True)).to(torch.int64).cumsum(axis) == 1
    return (first & (x == x.amax(axis, keepdim=True))).to(x.dtype)


_SOFT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": _hardmax,
}


@operator(*_SOFT)
def soft(node: Node, x: Tensor) -> Tensor:
    """Softmax and its kin; before opset 13 over everything from the axis on."""
    function = _SOFT[node.op_type]
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % max(1, x.dim())
    return function(x.flatten(axis), -1).reshape(x.shape) if x.dim() > axis else function(x, -1)


@operator("LayerNormalization")
def layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """Normalise over the last axes; mean and inverse deviation on request."""
    axis = node.get("axis", -1) % x.dim()
    epsilon, shape = node.get("epsilon", 1e-5), list(x.shape[axis:])
    if scale.dim() == len(shape) and list(scale.shape) == shape and node.outputs == 1:
        return functional.layer_norm(x, shape, scale, bias, epsilon)
    axes = list(range(axis, x.dim()))
    mean = x.mean(axes, keepdim=True)
    inverse = torch.rsqrt(((x - mean) ** 2).mean(axes, keepdim=True) + epsilon)
    y = (x - mean) * inverse * scale
    y = y if bias is None else y + bias
    return (y, mean, inverse)[: node.outputs] if node.outputs > 1 else y


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    """Divide by the root of the mean square over the last axes."""
    axis = node.get("axis", -1) % x.dim()
    square = (x * x).mean(list(range(axis, x.dim())), keepdim=True)
    return x * torch.rsqrt(square + node.get("epsilon", 1e-5)) * scale


@operator("BatchNormalization")
def batch_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalise by fixed statistics (inference)."""
    if x.dim() < 2:
        return (x - mean) * torch.rsqrt(variance + node.get("epsilon", 1e-5)) * scale + bias
    return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalise every channel of every example."""
    return functional.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalise groups of channels; before opset 21 the scale is one a group."""
    groups = node.get("num_groups")
    if scale.shape[0] == groups and groups != x.shape[1]:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return functional.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


@operator("LRN")
def local_response(node: Node, x: Tensor) -> Tensor:
    """Divide by a power of the squares of neighbouring channels; an even window reaches one further up than down."""
    size = node.get("size")
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    square = (x * x).movedim(1, -1)
    padded = functional.pad(square, [before, after])
    total = padded.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    scale = node.get("bias", 1.0) + node.get("alpha", 0.0001) / size * total
    return x / scale ** node.get("beta", 0.75)


@operator("LpNormalization")
def lp_norm(node: Node, x: Tensor) -> Tensor:
    """Divide by the norm along an axis; 0 stays 0."""
    norm = x.norm(node.get("p", 2), node.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization")
def mean_variance(node: Node, x: Tensor) -> Tensor:
    """Normalise over axes; the 1e-9 beside the deviation is the operator's own."""
    axes = list(node.get("axes") or [0, 2, 3])
    mean = x.mean(axes, keepdim=True)
    deviation = ((x * x).mean(axes, keepdim=True) - mean * mean).sqrt()
    return (x - mean) / (deviation + 1e-9)


@operator("GlobalAveragePool")
def global_average(node: Node, x: Tensor) -> Tensor:
    """The mean of every channel."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max(node: Node, x: Tensor) -> Tensor:
    """The maximum of every channel."""
    return x.amax(list(range(2, x.dim())), keepdim=True)
