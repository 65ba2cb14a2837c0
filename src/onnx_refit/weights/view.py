"""A checkpoint seen through names that are not its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from onnx_refit.tensors import TensorSpec
from onnx_refit.weights.source import WeightSource


class ViewProblemKind(Enum):
    """Why a weight cannot be had through a view."""

    AMBIGUOUS = "ambiguous"
    SHAPE = "shape"


@dataclass(frozen=True)
class ViewProblem:
    """A weight that a view cannot give although the checkpoint has tensors for it; ``text`` says why."""

    kind: ViewProblemKind
    text: str


@runtime_checkable
class NamedView(WeightSource, Protocol):
    """A weight source in other names over a checkpoint."""

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that a tensor of the view is made of."""
        ...

    def expected(self, name: str) -> tuple[TensorSpec, ...]:
        """The checkpoint tensors that a tensor of the view would be made of and that are not there."""
        ...

    def why_missing(self, name: str) -> str:
        """Why no checkpoint of this kind gives a tensor of the view, in words; empty where it is merely not there."""
        ...

    def unused(self, wanted: Collection[str]) -> Mapping[str, TensorSpec]:
        """The checkpoint tensors that none of the wanted tensors is made of, without those known to be left over."""
        ...

    @property
    def kept(self) -> frozenset[str]:
        """Weights that checkpoints of this kind never have and that stay as they are."""
        ...

    def dropped(self) -> Mapping[str, str]:
        """Checkpoint tensors that should matter and that the model has no place for -> why, in words."""
        ...

    @property
    def problems(self) -> Mapping[str, ViewProblem]:
        """Tensor of the view -> why it cannot be given."""
        ...
