"""The source weights of a version, read back from where they are."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_refit.engine.protocol import Backend
from onnx_refit.errors import WeightsError
from onnx_refit.refit.versions import Version
from onnx_refit.tensors import Array, TensorSpec


class VersionWeights:
    """A version as a weight source: engine weights rearranged back, or the arrays retained beside them."""

    def __init__(self, version: Version, specs: Mapping[str, TensorSpec], backend: Backend) -> None:
        self._version, self._specs, self._backend = version, specs, backend

    @property
    def description(self) -> str:
        """Where the tensors come from."""
        return f"version {self._version.number}"

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every refittable weight."""
        return self._specs

    def read(self, name: str) -> Array:
        """One source weight, bit for bit as it was given; WeightsError for a name the plan does not know."""
        if name in self._version.retained:
            return self._version.retained[name]
        if name not in self._specs:
            raise WeightsError("the plan has no such weight", where=name)
        return self._backend.recover(self._version.weights, name)

    def close(self) -> None:
        """Do nothing: the engine owns the memory."""
