"""Arithmetic on weights, written as nodes of the refit program.

Scales and biases are small vectors: they are computed in float32 (float64 for float64 weights) and rounded once to
the dtype of the weight they act on. A weight is scaled by exactly one ``Mul(weight, factor)``, the last node of its
recipe: scaling a scaled weight again multiplies the factors instead, so a backend may fuse the multiply into the
write of its own layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_refit.plan.program import ProgramBuilder
from onnx_refit.tensors import Array, numpy_dtype, onnx_dtype


class Recipes:
    """Builds recipes in a refit program; shared by all folds, so that it knows what is a scaled weight."""

    def __init__(self, program: ProgramBuilder) -> None:
        self.program = program
        self._scaled: dict[str, tuple[str, str]] = {}
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def constant(self, array: Array, wish: str) -> str:
        """A constant; equal ones are the same."""
        array = np.asarray(array)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self.program.constant(array, wish)
        return self._constants[key]

    def scalar(self, value: float, dtype: str) -> str:
        """A constant of shape ``[]``."""
        return self.constant(np.array(value, numpy_dtype(dtype)), "scalar")

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        """The value in another shape; itself where it has it already."""
        if self.program.shape(value) == tuple(shape):
            return value
        if value in self.program.constants:
            return self.constant(self.program.constants[value].reshape(tuple(shape)), value)
        return self.program.add(
            "Reshape", [value, self.constant(np.array(shape, np.int64), "shape")], f"{value}_shaped"
        )

    def flat(self, value: str) -> str:
        """The value as a vector."""
        return self.reshape(value, (math.prod(self.program.shape(value)),))

    def cast(self, value: str, dtype: str) -> str:
        """The value in another dtype; itself where it has it already."""
        if self.program.dtype(value) == dtype:
            return value
        if value in self.program.constants:
            return self.constant(self.program.constants[value].astype(numpy_dtype(dtype)), value)
        return self.program.add("Cast", [value], f"{value}_{dtype}", to=onnx_dtype(dtype))

    def wide(self, value: str) -> str:
        """The value in the dtype that scales and biases are computed in."""
        return self.cast(value, "float64" if self.program.dtype(value) == "float64" else "float32")

    def binary(self, op_type: str, left: str, right: str, wish: str) -> str:
        """Add, Sub, Mul or Div of two values, brought to the wider of their computing dtypes."""
        left, right = self.wide(left), self.wide(right)
        if "float64" in {self.program.dtype(left), self.program.dtype(right)}:
            left, right = self.cast(left, "float64"), self.cast(right, "float64")
        return self.program.add(op_type, [left, right], wish)

    def vector(self, value: str, size: int) -> str:
        """A value of ``size`` elements, or of one element repeated, as ``[size]``."""
        if math.prod(self.program.shape(value)) == size:
            return self.reshape(value, (size,))
        zeros = self.constant(np.zeros(size, numpy_dtype(self.program.dtype(value))), "zeros")
        return self.program.add("Add", [zeros, self.reshape(value, (1,))], f"{value}_vector")

    def scale(self, weight: str, factor: str) -> str:
        """``weight * factor``, the factor broadcasting to the weight's shape; the result has the weight's dtype."""
        if weight in self._scaled:
            weight, earlier = self._scaled[weight]
            factor = self.binary("Mul", earlier, factor, f"{weight}_factor")
        rounded = self.cast(factor, self.program.dtype(weight))
        result = self.program.add("Mul", [weight, rounded], f"{weight}_scaled")
        self._scaled[result] = (weight, factor)
        return result
