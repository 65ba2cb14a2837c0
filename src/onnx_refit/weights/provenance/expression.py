"""How one weight is made of checkpoint tensors, as data: a small tree of exact operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array, numpy_dtype
from onnx_refit.weights.scan import cast

Reader: TypeAlias = Callable[[str], Array]
"""Gives a checkpoint tensor by name."""


class Factor(Enum):
    """How a constant is applied."""

    MULTIPLY = "multiply"
    DIVIDE = "divide"


class FoldPart(Enum):
    """Which result of folding a BatchNorm into the layer before it."""

    WEIGHT = "weight"
    BIAS = "bias"


class ScaleForm(Enum):
    """In which order an exporter computed gamma / sqrt(variance + epsilon)."""

    DIVIDED = "divided"  # gamma / sqrt(v + e)
    RECIPROCAL = "reciprocal"  # gamma * (1 / sqrt(v + e))


class BiasForm(Enum):
    """In which order an exporter computed the folded bias, with s the scale."""

    SHIFT_SCALE = "shift-scale"  # (b - mean) * s + beta
    SCALE_SUM = "scale-sum"  # b * s + (beta - mean * s)
    SCALE_SHIFT = "scale-shift"  # (b * s - mean * s) + beta


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the checkpoint as it is."""

    name: str


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in the same order under another shape."""

    of: Expression
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transpose:
    """The axes in another order: axis i of the result is axis ``perm[i]``."""

    of: Expression
    perm: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Convert:
    """A cast as the exporter made it, rounding to nearest; overflow is an error."""

    of: Expression
    dtype: str


@dataclass(frozen=True, slots=True)
class Slice:
    """The elements ``[start, stop)`` along an axis."""

    of: Expression
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts side by side along an axis."""

    parts: tuple[Expression, ...]
    axis: int


@dataclass(frozen=True, slots=True)
class Take:
    """The lines along an axis at some indices, in their order, repeats included."""

    of: Expression
    axis: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """Every element multiplied with or divided by a constant, in the dtype of the tensor."""

    of: Expression
    by: float
    how: Factor


@dataclass(frozen=True, slots=True)
class BatchNormFold:
    """Weight or bias of a layer into which an exporter folded the BatchNorm that follows it.

    Attributes:
        part: weight or bias of the result.
        of: the layer's own weight or bias; None for a bias it does not have.
        gamma, beta, mean, variance: the BatchNorm's tensors, all [C]; gamma and beta None where it has none.
        epsilon: its epsilon.
        axis: the axis of the weight that holds the C output channels.
        scale_form: order of the arithmetic of the scale.
        bias_form: order of the arithmetic of the bias.
    """

    part: FoldPart
    of: Expression | None
    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    epsilon: float
    axis: int
    scale_form: ScaleForm
    bias_form: BiasForm


Expression: TypeAlias = Stored | Reshape | Transpose | Convert | Slice | Concat | Take | Scale | BatchNormFold


def evaluate(expression: Expression, read: Reader) -> Array:
    """Compute a weight from checkpoint tensors.

    Returns:
        The weight; a view of a checkpoint tensor where the operations allow it.

    Raises:
        WeightsError: a tensor cannot be read, or does not have the shape the operations need.
    """
    try:
        with np.errstate(all="ignore"):
            return _evaluate(expression, read)
    except (ValueError, IndexError, TypeError) as error:
        raise WeightsError(f"the tensors do not fit together: {error}", where=describe(expression)) from error


def _evaluate(expression: Expression, read: Reader) -> Array:
    match expression:
        case Stored(name):
            return read(name)
        case Reshape(of, shape):
            return np.ascontiguousarray(_evaluate(of, read)).reshape(shape)
        case Transpose(of, perm):
            return _evaluate(of, read).transpose(perm)
        case Convert(of, dtype):
            result = cast(_evaluate(of, read), dtype, rounding=True)
            if result.array is None:
                worst = f", for example {result.worst.value}" if result.worst else ""
                raise WeightsError(f"a value does not fit into {dtype}{worst}", where=describe(expression))
            return result.array
        case Slice(of, axis, start, stop):
            whole = _evaluate(of, read)
            return whole[(slice(None),) * axis + (slice(start, stop),)]
        case Concat(parts, axis):
            return np.concatenate([_evaluate(part, read) for part in parts], axis)
        case Take(of, axis, indices):
            return _evaluate(of, read).take(indices, axis)
        case Scale(of, by, how):
            values = _evaluate(of, read)
            factor = np.asarray(by).astype(values.dtype)
            scaled: Array = np.multiply(values, factor) if how is Factor.MULTIPLY else np.divide(values, factor)
            return scaled
        case BatchNormFold():
            return _fold(expression, read)


def batch_norm_scale(fold: BatchNormFold, read: Reader) -> Array:
    """The factor of each channel, [C]: gamma / sqrt(variance + epsilon) in the order the fold says."""
    # Any: NumPy's types have no arithmetic on arrays of an unknown dtype.
    variance: Any = read(fold.variance)
    gamma: Any = np.ones_like(variance) if fold.gamma is None else read(fold.gamma)
    one = np.asarray(1).astype(variance.dtype)
    deviation = np.sqrt(variance + np.asarray(fold.epsilon).astype(variance.dtype))
    scale: Array = gamma / deviation if fold.scale_form is ScaleForm.DIVIDED else gamma * (one / deviation)
    return scale


def folded_bias(fold: BatchNormFold, scale: Any, read: Reader) -> Array:
    """The bias of a folded layer, [C], with a given scale."""
    mean: Any = read(fold.mean)
    beta: Any = np.zeros_like(mean) if fold.beta is None else read(fold.beta)
    bias: Any = np.zeros_like(mean) if fold.of is None else _evaluate(fold.of, read)
    result: Array
    if fold.bias_form is BiasForm.SHIFT_SCALE:
        result = (bias - mean) * scale + beta
    elif fold.bias_form is BiasForm.SCALE_SUM:
        result = bias * scale + (beta - mean * scale)
    else:
        result = (bias * scale - mean * scale) + beta
    return result


def _fold(fold: BatchNormFold, read: Reader) -> Array:
    scale: Any = batch_norm_scale(fold, read)
    if fold.part is FoldPart.BIAS:
        return folded_bias(fold, scale, read)
    if fold.of is None:
        raise WeightsError("a folded weight needs the layer's weight", where=fold.mean)
    weight: Any = _evaluate(fold.of, read)
    shape = [1] * weight.ndim
    shape[fold.axis] = -1
    folded: Array = weight * scale.reshape(shape)
    return folded


def tensors_of(expression: Expression) -> Iterator[str]:
    """The checkpoint tensors an expression reads, in order, repeats included."""
    match expression:
        case Stored(name):
            yield name
        case Concat(parts, _):
            for part in parts:
                yield from tensors_of(part)
        case BatchNormFold():
            if expression.of is not None:
                yield from tensors_of(expression.of)
            tensors: tuple[str | None, ...] = (expression.gamma, expression.variance)
            if expression.part is FoldPart.BIAS:
                tensors = (*tensors, expression.beta, expression.mean)
            yield from (tensor for tensor in tensors if tensor is not None)
        case _:
            yield from tensors_of(expression.of)


def renamed(expression: Expression, rename: Callable[[str], str]) -> Expression:
    """The same expression over tensors of other names."""
    match expression:
        case Stored(name):
            return Stored(rename(name))
        case Concat(parts, axis):
            return Concat(tuple(renamed(part, rename) for part in parts), axis)
        case BatchNormFold():
            return replace(
                expression,
                of=None if expression.of is None else renamed(expression.of, rename),
                gamma=None if expression.gamma is None else rename(expression.gamma),
                beta=None if expression.beta is None else rename(expression.beta),
                mean=rename(expression.mean),
                variance=rename(expression.variance),
            )
        case _:
            return replace(expression, of=renamed(expression.of, rename))


def dtype_of(expression: Expression, stored: Callable[[str], str]) -> str:
    """The dtype an expression gives, from the dtypes of the checkpoint tensors."""
    match expression:
        case Stored(name):
            return stored(name)
        case Convert(_, dtype):
            return dtype
        case Concat(parts, _):
            dtypes = {dtype_of(part, stored) for part in parts}
            if len(dtypes) == 1:
                return dtypes.pop()
            return _name(np.result_type(*(numpy_dtype(d) for d in dtypes)))
        case BatchNormFold():
            return stored(expression.variance) if expression.of is None else dtype_of(expression.of, stored)
        case _:
            return dtype_of(expression.of, stored)


def _name(dtype: np.dtype[np.generic]) -> str:
    return str(dtype)


def describe(expression: Expression) -> str:
    """An expression as people write it: ``transpose(h.0.weight, [1, 0])``."""
    match expression:
        case Stored(name):
            return name
        case Reshape(of, shape):
            return f"reshape({describe(of)}, {list(shape)})"
        case Transpose(of, perm):
            return f"transpose({describe(of)}, {list(perm)})"
        case Convert(of, dtype):
            return f"{dtype}({describe(of)})"
        case Slice(of, axis, start, stop):
            return f"slice({describe(of)}, axis {axis}, {start}:{stop})"
        case Concat(parts, axis):
            return f"concat({', '.join(describe(part) for part in parts)}, axis {axis})"
        case Take(of, axis, indices):
            return f"take({describe(of)}, axis {axis}, {len(indices)} indices)"
        case Scale(of, by, how):
            return f"{describe(of)} {'*' if how is Factor.MULTIPLY else '/'} {by}"
        case BatchNormFold():
            inner = "no bias" if expression.of is None else describe(expression.of)
            return f"fold({inner}, BatchNorm of {expression.mean}, {expression.part.value})"
