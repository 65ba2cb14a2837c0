"""Tensors as bits: which are equal, which are rearrangements of each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_refit.tensors import Array
from onnx_refit.weights.provenance.expression import Expression, Reshape, Transpose
from onnx_refit.weights.scan import same_bits

_CHUNK = 1 << 16
_PROBES = 24
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class Signature:
    """What all rearrangements of one tensor share; equal signatures still need a comparison."""

    dtype: np.dtype[np.generic]
    size: int
    total: int
    squares: int


def as_bits(array: Array) -> npt.NDArray[np.unsignedinteger]:
    """The elements as unsigned integers of their width, same shape and strides (not for complex128)."""
    return array.view(_UNSIGNED[array.itemsize])


def signature(array: Array) -> Signature:
    """The signature of a tensor: sums over its elements' bits, whatever their order."""
    bits = as_bits(np.ascontiguousarray(array)).reshape(-1)
    total = squares = np.uint64(0)
    with np.errstate(over="ignore"):
        for start in range(0, bits.size, _CHUNK):
            chunk = bits[start : start + _CHUNK].astype(np.uint64)
            total += chunk.sum(dtype=np.uint64)
            chunk *= chunk + np.uint64(0x9E3779B97F4A7C15)
            squares += (chunk >> np.uint64(7)).sum(dtype=np.uint64)
    return Signature(array.dtype, array.size, int(total), int(squares))


def is_constant(array: Array) -> bool:
    """Whether all elements have the same bits (a tensor of one element has)."""
    if array.size <= 1:
        return True
    bits = as_bits(np.ascontiguousarray(array)).reshape(-1)
    if bits[0] != bits[-1] or bits[0] != bits[bits.size // 2]:
        return False
    return bool((bits == bits[0]).all())


def _probe_points(shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    size = math.prod(shape)
    generator = np.random.default_rng(size)
    return generator.integers(0, size, _PROBES)


def same_when_permuted(wanted: Array, stored: Array, perm: tuple[int, ...]) -> bool:
    """Whether ``wanted == stored.transpose(perm)``, bit for bit; a few elements decide most cases."""
    view = stored.transpose(perm)
    if view.shape != wanted.shape:
        return False
    if wanted.size == 0:
        return True
    points = np.unravel_index(_probe_points(wanted.shape), wanted.shape)
    if not np.array_equal(as_bits(wanted[points]), as_bits(view[points])):
        return False
    return same_bits(wanted, view)


def arrangements(wanted: Array, stored: Array, of: Expression) -> Iterator[Expression]:
    """The ways to rearrange a stored tensor into a wanted one, plainest first.

    Args:
        wanted: the weight.
        stored: a tensor of the same dtype and number of elements.
        of: what the stored tensor is called.

    Yields:
        Expressions over ``of``: as it is, transposed, reshaped, transposed and reshaped, reshaped and transposed.
    """
    if wanted.dtype != stored.dtype or wanted.size != stored.size:
        return
    if wanted.shape == stored.shape and same_bits(wanted, stored):
        yield of
    for perm in permutations(stored.shape):
        if same_when_permuted(wanted, stored, perm):
            yield Transpose(of, perm)
    if wanted.shape == stored.shape:
        return
    flat = np.ascontiguousarray(wanted).reshape(-1)
    if same_bits(flat, np.ascontiguousarray(stored).reshape(-1)):
        yield Reshape(of, wanted.shape)
        return
    for perm in permutations(stored.shape):
        view = stored.transpose(perm)
        if view.shape != wanted.shape and _same_flat(wanted, view):
            yield Reshape(Transpose(of, perm), wanted.shape)
            return
    for perm in permutations(wanted.shape):
        view = wanted.transpose(perm)
        if view.shape != stored.shape and _same_flat(stored, view):
            inverse = tuple(int(i) for i in np.argsort(perm))
            yield Transpose(Reshape(of, view.shape), inverse)
            return


def permutations(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The orders of axes that move data, not the one that is there already; none for more than five axes."""
    if len(shape) > 5:
        return
    plain = tuple(range(len(shape)))
    long = [axis for axis in plain if shape[axis] != 1]
    for perm in itertools.permutations(plain):
        if perm != plain and (len(long) > 1 or len(shape) <= 2):
            yield perm


def _same_flat(left: Array, right: Array) -> bool:
    """Whether two arrays hold the same bits in C order, whatever their shapes."""
    points = _probe_points(left.shape)
    a = left[np.unravel_index(points, left.shape)]
    b = right[np.unravel_index(points, right.shape)]
    if not np.array_equal(as_bits(a), as_bits(b)):
        return False
    return same_bits(np.ascontiguousarray(left).reshape(-1), np.ascontiguousarray(right).reshape(-1))
