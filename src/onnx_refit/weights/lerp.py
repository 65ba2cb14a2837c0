"""Interpolation between two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array, TensorSpec, is_floating
from onnx_refit.weights.scan import cast, same_bits
from onnx_refit.weights.source import WeightSource


class LerpSource:
    """``(1 - t) * a + t * b``, computed in float32 (float64 for float64) and cast to the dtype of ``a``.

    At t = 0 and t = 1 the result has the bits of one of the two. Integer tensors must be equal in both.

    Args:
        a: the checkpoint at t = 0.
        b: the checkpoint at t = 1.
        t: where between them; values outside [0, 1] extrapolate.

    Raises:
        WeightsError: the two do not have the same names, shapes and dtypes, or t is not finite.
    """

    def __init__(self, a: WeightSource, b: WeightSource, t: float) -> None:
        if not math.isfinite(t):
            raise WeightsError(f"{t} is no place between two checkpoints")
        if dict(a.specs) != dict(b.specs):
            name = next(n for n in [*a.specs, *b.specs] if a.specs.get(n) != b.specs.get(n))
            raise WeightsError(
                f"{name!r} differs: {a.specs.get(name, 'absent')} in {a.description}, "
                f"{b.specs.get(name, 'absent')} in {b.description}",
                hint="Interpolation needs two checkpoints of one model",
            )
        self._a, self._b, self._t = a, b, t

    @property
    def description(self) -> str:
        """Both checkpoints and the place between them."""
        return f"{self._a.description} to {self._b.description} at {self._t:g}"

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs that both have."""
        return self._a.specs

    def read(self, name: str) -> Array:
        """One interpolated tensor; WeightsError where integers differ or a value overflows."""
        if self._t in (0, 1):
            return (self._b if self._t else self._a).read(name)
        a, b = self._a.read(name), self._b.read(name)
        dtype = self._a.specs[name].dtype
        if not is_floating(dtype):
            if not same_bits(a, b):
                raise WeightsError(f"{dtype} cannot be interpolated, and the two differ", where=name)
            return a
        wide = np.dtype(np.float64 if dtype == "float64" else np.float32)
        # Any: NumPy's types have no arithmetic on arrays of an unknown dtype.
        left: Any = a.astype(wide)
        right: Any = b.astype(wide)
        result = cast(left * wide.type(1 - self._t) + right * wide.type(self._t), dtype, rounding=True)
        if result.array is None:
            raise WeightsError(f"interpolated values overflow {dtype}", where=name)
        return result.array

    def close(self) -> None:
        """Close both checkpoints."""
        self._a.close()
        self._b.close()
