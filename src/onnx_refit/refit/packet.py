"""The small weights of a model behind each other in one array: read, looked at and copied together.

A call a tensor costs more than the work on it where tensors are small, and a model may have thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnx_refit.moves.addresses import address_of
from onnx_refit.moves.roll import Called, Joined, Roll
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.scan import all_finite

SMALL = 1 << 13  # elements


class Packet:
    """The float32 weights of few elements, in a fixed order, and memory to join them in.

    One refit at a time uses the memory; a version copies what it keeps of it.

    Attributes:
        names: the weights.
        size: elements of all of them.

    Args:
        specs: all weights there are, in the order wanted.
        roll: all weights there are, where they are looked at together.
    """

    def __init__(self, specs: Iterable[TensorSpec], roll: Roll | None = None) -> None:
        chosen = [spec for spec in specs if spec.dtype == "float32" and 0 < spec.size <= SMALL]
        self.names = tuple(spec.name for spec in chosen)
        self._shapes = [spec.static_shape for spec in chosen]
        # Where all are vectors they need not be flattened, which takes half of the time.
        self._axis = 0 if all(len(shape) == 1 for shape in self._shapes) else None
        ends = np.cumsum([spec.size for spec in chosen]).tolist()
        self._ranges = list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
        self.size: int = ends[-1] if ends else 0
        self.roll = roll
        self._native = None if roll is None or roll.native is None else Joined(roll, self.names)
        # One attribute for both, which somebody may clear meanwhile: so they never belong to different memory.
        self._memory: tuple[Array, Mapping[str, Array], int] | None = None

    def range(self, names: frozenset[str]) -> tuple[int, int]:
        """First element and end of these weights, which lie side by side."""
        ranges = [part for name, part in zip(self.names, self._ranges, strict=True) if name in names]
        return (ranges[0][0], ranges[-1][1]) if ranges else (0, 0)

    def positions(self, count: int) -> Array:
        """So many positions in each weight, spread over it: int64 ``[weights, count]``."""
        rng = np.random.default_rng(0)
        rows = [rng.integers(begin, end, count) for begin, end in self._ranges]
        return np.array(rows, np.int64).reshape(len(rows), count)

    def join(self, arrays: Mapping[str, Array]) -> tuple[Array, bool]:
        """All weights, flat, in this packet's own memory: good until the next call; and whether they are finite."""
        joined, _, address = self.memory()
        addresses = arrays.addresses if isinstance(arrays, Called) else None
        if self._native is not None and addresses is not None:
            return joined, self._native.into(addresses, address)
        if self.names:
            np.concatenate([arrays[name] for name in self.names], axis=self._axis, out=joined)
        return joined, all_finite(joined)

    def memory(self) -> tuple[Array, Mapping[str, Array], int]:
        """The packet's own memory with what was joined last, or anything: flat, each weight in it, and its address."""
        memory = self._memory
        if memory is None:
            whole = np.empty(self.size, np.float32)
            parts = zip(self.names, self._ranges, self._shapes, strict=True)
            views = {name: whole[begin:end].reshape(shape) for name, (begin, end), shape in parts}
            self._memory = memory = whole, views, address_of(whole)
        return memory

    @property
    def views(self) -> Mapping[str, Array]:
        """Each weight in what was joined last: the same arrays after each call; none where it was cleared since."""
        memory = self._memory
        return {} if memory is None else memory[1]

    def clear(self) -> None:
        """Give the memory back."""
        self._memory = None
