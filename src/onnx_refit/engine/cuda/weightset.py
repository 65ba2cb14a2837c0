"""A weight set of the CUDA engine: for every engine weight, the arena that holds it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from onnx_refit.engine.cuda.arena import Arena
from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.protocol import FullSpeed
from onnx_refit.engine.single_tier import SingleTier

_serials = itertools.count(1)


class CudaWeightSet:
    """One complete, immutable set of engine weights in device memory.

    A set that replaces everything has an arena of its own; one that replaces a part has a small arena and shares the
    rest with the set it was derived from.

    Args:
        arena: what this set made itself.
        places: engine weight name -> the arena that holds it; None where it is this one for all.
        shared_nbytes: bytes of the others.

    Attributes:
        serial: a number that no other set of the process has.
        arena: what this set made itself.
        nbytes: bytes of all its engine weights, shared ones included.
        shared_nbytes: bytes shared with the set it was derived from.
        full_speed: when it reaches its last tier of speed: at once.
    """

    full_speed: FullSpeed = SingleTier()

    def __init__(self, arena: Arena, places: Mapping[str, Arena] | None = None, shared_nbytes: int = 0) -> None:
        self.serial = next(_serials)
        self.arena = arena
        self._places = places
        self.nbytes = shared_nbytes + arena.layout.payload
        self.shared_nbytes = shared_nbytes

    @property
    def places(self) -> Mapping[str, Arena]:
        """Engine weight name -> the arena that holds it."""
        if self._places is None:
            self._places = dict.fromkeys(self.arena.layout.slots, self.arena)
        return self._places

    def keep(self) -> None:
        """Somebody may read its memory who does not hold this set, or does not wait; see ``Memory``."""
        for arena in {arena.serial: arena for arena in self.places.values()}.values():
            arena.keep()

    def view(self, name: str) -> Tensor:
        """An engine weight on the device."""
        return self.places[name].view(name)
