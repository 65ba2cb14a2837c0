"""How a weight is made of a checkpoint's tensors, computed where they are.

Only what gives the host's bits: rearrangements, and arithmetic in the host's order with its separate roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.weights.provenance.expression import (
    BatchNormFold,
    BiasForm,
    Concat,
    Expression,
    Factor,
    FoldPart,
    Reshape,
    Scale,
    ScaleForm,
    Slice,
    Stored,
    Take,
    Transpose,
)

Read = Callable[[str], Tensor]
"""Gives a checkpoint's tensor by name."""

_EXACT = (torch.float32, torch.float64)  # whose arithmetic rounds once an operator, here and there


class _Elsewhere(Exception):  # noqa: N818 - no error: the host computes it
    """The device would not give the host's bits."""


def view_of(expression: Expression, read: Read) -> tuple[Tensor, str] | None:
    """The weight as a view of one tensor, and that tensor's name; None where it is none."""
    match expression:
        case Stored(name):
            return read(name), name
        case Transpose(of, perm):
            found = view_of(of, read)
            return None if found is None or len(perm) != found[0].dim() else (found[0].permute(perm), found[1])
        case Slice(of, axis, start, stop):
            found = view_of(of, read)
            return None if found is None else (found[0][_along(axis, start, stop)], found[1])
        case Reshape(of, shape):
            found = view_of(of, read)
            try:
                return None if found is None else (found[0].view(shape), found[1])
            except RuntimeError:  # its elements do not lie so
                return None
    return None


def computed(expression: Expression, read: Read, *, check: bool = False) -> Any:
    """The weight as a new tensor.

    Args:
        expression: how it is made.
        read: gives the tensors.
        check: whether to give None where the device is not known to give the host's bits, or the tensors do not fit.
    """
    try:
        return _computed(expression, read).contiguous()
    except (_Elsewhere, RuntimeError, IndexError):
        if check:
            return None
        raise


def _along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(start, stop),)


def _computed(expression: Expression, read: Read) -> Tensor:
    match expression:
        case Stored(name):
            return read(name)
        case Reshape(of, shape):
            return _computed(of, read).reshape(shape)
        case Transpose(of, perm):
            return _computed(of, read).permute(perm)
        case Slice(of, axis, start, stop):
            return _computed(of, read)[_along(axis, start, stop)]
        case Concat(parts, axis):
            values = [_computed(part, read) for part in parts]
            if len({value.dtype for value in values}) > 1:
                raise _Elsewhere
            return torch.cat(values, axis)
        case Take(of, axis, indices):
            value = _computed(of, read)
            return value.index_select(axis, torch.tensor(indices, device=value.device))
        case Scale(of, by, how):
            value = _exact(_computed(of, read))
            factor = torch.tensor(by, dtype=torch.float64).to(value.dtype).to(value.device)
            return value * factor if how is Factor.MULTIPLY else value / factor
        case BatchNormFold():
            return _fold(expression, read)
    raise _Elsewhere  # a cast that must not overflow


def _exact(value: Tensor) -> Tensor:
    if value.dtype not in _EXACT:
        raise _Elsewhere
    return value


def _fold(fold: BatchNormFold, read: Read) -> Tensor:
    variance = _exact(read(fold.variance))
    epsilon = torch.tensor(fold.epsilon, dtype=torch.float64).to(variance.dtype).to(variance.device)
    gamma = torch.ones_like(variance) if fold.gamma is None else _exact(read(fold.gamma))
    deviation = torch.sqrt(variance + epsilon)
    if fold.scale_form is ScaleForm.DIVIDED:
        scale = gamma / deviation
    else:
        scale = gamma * (torch.ones((), dtype=variance.dtype, device=variance.device) / deviation)
    if fold.part is FoldPart.BIAS:
        mean = _exact(read(fold.mean))
        beta = torch.zeros_like(mean) if fold.beta is None else _exact(read(fold.beta))
        bias = torch.zeros_like(mean) if fold.of is None else _exact(_computed(fold.of, read))
        if fold.bias_form is BiasForm.SHIFT_SCALE:
            return (bias - mean) * scale + beta
        if fold.bias_form is BiasForm.SCALE_SUM:
            return bias * scale + (beta - mean * scale)
        return (bias * scale - mean * scale) + beta
    if fold.of is None:
        raise _Elsewhere
    weight = _exact(_computed(fold.of, read))
    shape = [1] * weight.dim()
    shape[fold.axis] = -1
    return weight * scale.reshape(shape)
