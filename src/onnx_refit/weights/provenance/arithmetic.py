"""Weights that are a checkpoint tensor after arithmetic: a constant factor, or a BatchNorm folded in.

The arithmetic is done again in each order that exporters are known to use, and the result must agree to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from onnx_refit.tensors import Array
from onnx_refit.weights.provenance.bits import as_bits, permutations
from onnx_refit.weights.provenance.expression import (
    BatchNormFold,
    BiasForm,
    Expression,
    Factor,
    FoldPart,
    Scale,
    ScaleForm,
    Stored,
    Transpose,
    batch_norm_scale,
    evaluate,
    folded_bias,
)
from onnx_refit.weights.provenance.pool import BatchNorm, Pool
from onnx_refit.weights.scan import same_bits

_EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-12, 1e-2, 0.0)
_ULPS = 3
_SAMPLE = 64


def find_scales(pool: Pool, wanted: Array) -> list[Expression]:
    """The ways in which a weight is a checkpoint tensor times or over a constant, bit for bit."""
    found: list[Expression] = []
    if wanted.dtype.kind != "f" or wanted.size < 2:
        return found
    sizes = sorted(wanted.shape)
    for name, shape in pool.of_dtype(wanted.dtype):
        if sorted(shape) != sizes:
            continue
        array = pool.read(name)
        plain: Iterable[tuple[int, ...] | None] = [None, *permutations(shape)]
        for perm in plain:
            view = array if perm is None else array.transpose(perm)
            if view.shape != wanted.shape:
                continue
            of: Expression = Stored(name) if perm is None else Transpose(Stored(name), perm)
            for by, how in _factors(wanted, view):
                scaled = Scale(of, by, how)
                if same_bits(wanted, evaluate(scaled, pool.read)):
                    found.append(scaled)
                    break
    return found


def _factors(wanted: Array, stored: Array) -> Iterator[tuple[float, Factor]]:
    """The constants that turn a sample of one tensor into a sample of the other, to the last bit."""
    step = max(1, wanted.size // _SAMPLE)
    # Any: NumPy's types have no arithmetic on arrays of an unknown dtype.
    a: Any = wanted.reshape(-1)[::step]
    b: Any = stored.reshape(-1)[::step]
    at = int(np.argmax(np.abs(b)))
    if not b[at] or not np.isfinite(b[at]) or not np.isfinite(a[at]) or not a[at]:
        return
    with np.errstate(all="ignore"):
        ratio = np.float64(a[at]) / np.float64(b[at])
        if not np.allclose(a.astype(np.float64), b.astype(np.float64) * ratio, rtol=1e-2, atol=0):
            return
        for how, middle in ((Factor.MULTIPLY, ratio), (Factor.DIVIDE, 1 / ratio)):
            for value in _neighbours(a.dtype.type(middle)):
                result = b * value if how is Factor.MULTIPLY else b / value
                if value != 1 and np.array_equal(result, a):
                    yield float(value), how


def _neighbours(value: Any) -> Iterator[Any]:
    """A floating-point number and those next to it, nearest first."""
    yield value
    up = down = value
    for _ in range(_ULPS):
        up, down = np.nextafter(up, up.dtype.type(np.inf)), np.nextafter(down, down.dtype.type(-np.inf))
        yield up
        yield down


def find_folded_weights(pool: Pool, wanted: Array) -> dict[BatchNormFold, Array]:
    """The ways in which a weight is a layer's weight with the BatchNorm after it folded in.

    Returns:
        Folds, likeliest first, with the scale [C] that gives the weight's bits. It is the scale of correctly rounded
        arithmetic, but for the last bit of channels for which the exporter's square root was not correctly rounded
        (PyTorch's is not, and differs between processors); every element of such a channel agrees with that one bit
        set otherwise, or the fold is none.
    """
    found: dict[BatchNormFold, Array] = {}
    if wanted.dtype.kind != "f" or wanted.ndim < 2:
        return found
    sizes = sorted(wanted.shape)
    for axis in dict.fromkeys((0, 1, wanted.ndim - 1)):
        norms = pool.batch_norms(wanted.shape[axis])
        if not norms:
            continue
        for name, shape in pool.of_dtype(wanted.dtype):
            if sorted(shape) != sizes:
                continue
            array = pool.read(name)
            perms: list[tuple[int, ...] | None] = [None]
            if len(shape) == 2:
                perms.append((1, 0))
            for perm in perms:
                view = array if perm is None else array.transpose(perm)
                if view.shape != wanted.shape or not _scaled_by_channel(wanted, view, axis):
                    continue
                of: Expression = Stored(name) if perm is None else Transpose(Stored(name), perm)
                # BatchNorms that were never trained are all alike: the one that follows the layer comes first.
                here = pool.position[name]
                after = sorted(norms, key=lambda n: (pool.position[n.mean] < here, abs(pool.position[n.mean] - here)))
                found.update(_weight_folds(pool, wanted, view, of, after, axis))
        if found:
            break
    return found


def _scaled_by_channel(wanted: Array, stored: Array, axis: int) -> bool:
    """Whether it is worth a closer look: within some channels the ratio hardly varies."""
    channels = np.linspace(0, wanted.shape[axis] - 1, min(4, wanted.shape[axis])).astype(np.intp)
    with np.errstate(all="ignore"):
        for channel in channels:
            a = wanted.take(channel, axis).reshape(-1)[:_SAMPLE].astype(np.float64)
            b = stored.take(channel, axis).reshape(-1)[:_SAMPLE].astype(np.float64)
            at = int(np.argmax(np.abs(b)))
            if not b[at] or not np.allclose(a, b * (a[at] / b[at]), rtol=1e-3, atol=abs(a[at]) * 1e-5):
                return False
    return True


def _weight_folds(
    pool: Pool, wanted: Array, stored: Array, of: Expression, norms: list[BatchNorm], axis: int
) -> Iterator[tuple[BatchNormFold, Array]]:
    for norm in norms:
        for epsilon, form in itertools.product(_EPSILONS, ScaleForm):
            fold = _fold(FoldPart.WEIGHT, of, norm, epsilon, axis, form, BiasForm.SHIFT_SCALE)
            scale = _exact_scale(wanted, stored, batch_norm_scale(fold, pool.read), axis)
            if scale is not None:
                yield fold, scale
                break


def _exact_scale(wanted: Array, stored: Array, scale: Array, axis: int) -> Array | None:
    """The scale that gives the wanted bits, each channel's the given one or next to it; None where there is none."""
    # Any: NumPy's types have no arithmetic on arrays of an unknown dtype.
    rows: Any = np.moveaxis(stored, axis, 0).reshape(scale.size, -1)
    targets = np.ascontiguousarray(np.moveaxis(wanted, axis, 0)).reshape(scale.size, -1)
    result: Any = scale.astype(wanted.dtype)
    # One element says nothing about a channel's last bit.
    directions = (None, np.inf, -np.inf) if rows.shape[1] > 1 else (None,)
    with np.errstate(all="ignore"):
        for direction in directions:
            tried = result if direction is None else np.nextafter(scale, scale.dtype.type(direction))
            product = rows * tried[:, None]
            if direction is None:
                open_ = ~_same_rows(product, targets)
                if np.count_nonzero(open_) > max(1, open_.size // 2):
                    return None
            else:
                hit = open_ & _same_rows(product, targets)
                result = np.where(hit, tried, result)
                open_ &= ~hit
            if not open_.any():
                return np.asarray(result)
    return None


def _same_rows(left: Array, right: Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which rows agree in all bits."""
    return np.asarray((as_bits(np.ascontiguousarray(left)) == as_bits(right)).all(axis=1))


def find_folded_biases(pool: Pool, wanted: Array, weights: Mapping[BatchNormFold, Array]) -> list[Expression]:
    """The ways in which a bias is the partner of a folded weight, bit for bit.

    Args:
        pool: the checkpoint.
        wanted: the bias, [C].
        weights: the folded weights found so far, with their scales.
    """
    found: list[Expression] = []
    if wanted.dtype.kind != "f":
        return found
    for weight, scale in weights.items():
        if wanted.shape != scale.shape:
            continue
        own = [name for name in _siblings(pool, weight) if pool.specs[name].shape == wanted.shape]
        for of, form in itertools.product([*(Stored(name) for name in own), None], BiasForm):
            norm = BatchNorm(weight.mean, weight.variance, weight.gamma, weight.beta)
            fold = _fold(FoldPart.BIAS, of, norm, weight.epsilon, weight.axis, weight.scale_form, form)
            if same_bits(wanted, folded_bias(fold, scale, pool.read)):
                found.append(fold)
                break
    return found


def _siblings(pool: Pool, fold: BatchNormFold) -> list[str]:
    """The bias of the layer whose weight was folded, if the checkpoint has one."""
    of = fold.of.of if isinstance(fold.of, Transpose) else fold.of
    if not isinstance(of, Stored):
        return []
    stem = of.name.rpartition("weight")[0] or of.name.rpartition("kernel")[0]
    return [stem + "bias"] if stem and stem + "bias" in pool.specs else []


def _fold(
    part: FoldPart,
    of: Expression | None,
    norm: BatchNorm,
    epsilon: float,
    axis: int,
    scale_form: ScaleForm,
    bias_form: BiasForm,
) -> BatchNormFold:
    return BatchNormFold(
        part, of, norm.gamma, norm.beta, norm.mean, norm.variance, epsilon, axis, scale_form, bias_form
    )
