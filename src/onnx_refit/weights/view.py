"""A checkpoint seen through names that are not its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from onnx_refit.tensors import TensorSpec
from onnx_refit.weights.source import WeightSource


@runtime_checkable
class NamedView(WeightSource, Protocol):
    """A weight source in the model's names over a checkpoint that has others."""

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that a weight is made of."""
        ...

    @property
    def unused(self) -> Mapping[str, TensorSpec]:
        """The checkpoint tensors that no weight is made of, and that were not expected to be left over."""
        ...

    @property
    def problems(self) -> Mapping[str, str]:
        """Weight name -> why it cannot be told which tensor it is (two tensors of one name after renaming)."""
        ...
