"""The tensors of a checkpoint, indexed for the search."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from onnx_refit.tensors import Array, TensorSpec, is_floating, numpy_dtype
from onnx_refit.weights.provenance.bits import Signature, signature
from onnx_refit.weights.scan import cast
from onnx_refit.weights.source import WeightSource

_BATCH_NORM = (
    ("running_mean", "running_var", "weight", "bias"),
    ("moving_mean", "moving_variance", "gamma", "beta"),
    ("mean", "var", "scale", "bias"),
)


class BatchNorm:
    """The tensors of one BatchNorm of the checkpoint, by name; gamma and beta None where it has none."""

    def __init__(self, mean: str, variance: str, gamma: str | None, beta: str | None) -> None:
        self.mean, self.variance, self.gamma, self.beta = mean, variance, gamma, beta


class Pool:
    """The searchable tensors of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        sizes: numbers of elements that weights have; only tensors of such sizes are hashed.
    """

    def __init__(self, checkpoint: WeightSource, sizes: Iterable[int]) -> None:
        self._checkpoint = checkpoint
        self._sizes = set(sizes)
        # complex128 has no unsigned integer of its width; such tensors are only found by name.
        self.specs: dict[str, TensorSpec] = {
            name: spec for name, spec in checkpoint.specs.items() if spec.dtype != "complex128"
        }
        self.position = {name: i for i, name in enumerate(self.specs)}
        self._index: dict[Signature, list[str]] | None = None
        self._converted: dict[str, dict[Signature, list[str]]] = {}

    def read(self, name: str) -> Array:
        """One tensor of the checkpoint."""
        return self._checkpoint.read(name)

    def alike(self, wanted: Signature) -> list[str]:
        """The tensors whose elements are a rearrangement of the wanted ones, very likely."""
        if self._index is None:
            self._index = defaultdict(list)
            for name, spec in self.specs.items():
                if spec.size in self._sizes:
                    self._index[signature(self.read(name))].append(name)
        return self._index.get(wanted, [])

    def alike_when_converted(self, wanted: Signature, dtype: str) -> list[str]:
        """The tensors of another dtype whose cast to ``dtype`` is a rearrangement of the wanted elements."""
        index = self._converted.get(dtype)
        if index is None:
            index = self._converted[dtype] = defaultdict(list)
            for name, spec in self.specs.items():
                if spec.dtype != dtype and spec.size in self._sizes and is_floating(spec.dtype) and is_floating(dtype):
                    converted = self.convert(name, dtype)
                    if converted is not None:
                        index[signature(converted)].append(name)
        return index.get(wanted, [])

    def convert(self, name: str, dtype: str) -> Array | None:
        """A tensor cast as exporters cast, None where a value overflows."""
        return cast(self.read(name), dtype, rounding=True).array

    def of_dtype(self, dtype: np.dtype[np.generic]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of the tensors of one dtype."""
        for name, spec in self.specs.items():
            if numpy_dtype(spec.dtype) == dtype:
                yield name, spec.static_shape

    def batch_norms(self, channels: int) -> list[BatchNorm]:
        """The BatchNorms with so many channels, recognised by the names of their tensors."""
        found = []
        for name, spec in self.specs.items():
            if spec.shape != (channels,):
                continue
            for mean, variance, gamma, beta in _BATCH_NORM:
                stem = name.removesuffix(mean)
                if stem == name or stem[-1:].isalnum():
                    continue
                if self._has(stem + variance, channels):
                    found.append(
                        BatchNorm(
                            name,
                            stem + variance,
                            stem + gamma if self._has(stem + gamma, channels) else None,
                            stem + beta if self._has(stem + beta, channels) else None,
                        )
                    )
                    break
        return found

    def _has(self, name: str, channels: int) -> bool:
        spec = self.specs.get(name)
        return spec is not None and spec.shape == (channels,)
