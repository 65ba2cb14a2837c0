"""The protocol of a weight source: named tensors that can be looked at without being read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from onnx_refit.tensors import Array, TensorSpec


@runtime_checkable
class WeightSource(Protocol):
    """Named tensors of one checkpoint, opened but not read.

    Opening reads headers only; ``read`` gives one tensor, memory-mapped and read-only where the format allows it.
    """

    @property
    def description(self) -> str:
        """Where the tensors come from, for messages (a path, a URL, ``"mapping"``)."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor, in the order of the file."""
        ...

    def read(self, name: str) -> Array:
        """One tensor as a host array in its stored dtype; WeightsError if it cannot be read whole."""
        ...

    def close(self) -> None:
        """Release files and maps; arrays already read stay valid."""
        ...


def read_all(source: WeightSource) -> Iterator[tuple[str, Array]]:
    """Every (name, array) of a source, in file order."""
    for name in source.specs:
        yield name, source.read(name)
