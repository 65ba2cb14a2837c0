"""A weight set of the TensorRT engine: the engine weights kept beside the device engines, host or device memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx_refit.engine.protocol import FullSpeed
from onnx_refit.engine.single_tier import SingleTier
from onnx_refit.tensors import TensorSpec


@dataclass(frozen=True)
class StoredWeight:
    """One engine weight where a refit reads it.

    Attributes:
        spec: name, dtype and shape; stored densely in C order.
        address: where it begins.
        on_device: whether that is GPU memory.
        owner: what keeps the memory alive (for host memory: the array).
    """

    spec: TensorSpec
    address: int
    on_device: bool
    owner: object


class TensorRtWeightSet:
    """One complete, immutable set of engine weights.

    A TensorRT engine has its weights inside, so a set answers requests only from a device engine that was refitted
    with it. The set keeps its own copy of the weights, so that it can be refitted into an engine again at any time.
    """

    def __init__(self, weights: Mapping[str, StoredWeight], shared_nbytes: int) -> None:
        self.weights = weights
        self._shared = shared_nbytes
        self._full_speed = SingleTier()

    @property
    def nbytes(self) -> int:
        """Bytes of all its engine weights, shared ones included."""
        return sum(weight.spec.nbytes for weight in self.weights.values())

    @property
    def shared_nbytes(self) -> int:
        """Bytes shared with the set it was derived from."""
        return self._shared

    @property
    def full_speed(self) -> FullSpeed:
        """When this set reaches its last tier of speed: at once."""
        return self._full_speed
