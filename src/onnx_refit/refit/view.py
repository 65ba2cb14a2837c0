"""The source weights of a version, read back from where they are."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_refit.engine.protocol import Backend, WeightSet
from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array, TensorSpec


class VersionWeights:
    """A weight set as a weight source: engine weights rearranged back, or the arrays retained beside them.

    Args:
        weights: the weight set.
        retained: the source weights that cannot be read back from it.
        specs: name -> spec of every refittable weight.
        backend: the backend that derived the set.
        description: what to call it in messages.
    """

    def __init__(
        self,
        weights: WeightSet,
        retained: Mapping[str, Array],
        specs: Mapping[str, TensorSpec],
        backend: Backend,
        description: str,
    ) -> None:
        self._weights, self._retained, self._specs, self._backend = weights, retained, specs, backend
        self._description = description

    @property
    def description(self) -> str:
        """Where the tensors come from."""
        return self._description

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every refittable weight."""
        return self._specs

    def read(self, name: str) -> Array:
        """One source weight, bit for bit as it was given; WeightsError for a name the plan does not know."""
        if name in self._retained:
            return self._retained[name]
        if name not in self._specs:
            raise WeightsError("the plan has no such weight", where=name)
        return self._backend.recover(self._weights, name)

    def close(self) -> None:
        """Do nothing: the engine owns the memory."""
