"""What is kept of a refit on the device beside the engine's weights: copies of source weights, and their samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda.arena import Arena, Slot
from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

SAMPLES = 32
"""Elements of a weight, at most."""

WIDEST = 8
"""Bytes of an element, at most."""


class PutAside(Mapping[str, Array]):
    """Copies of weights on a device; reading one brings it to the host.

    Args:
        arena: the copies.
        specs: of the weights.
    """

    def __init__(self, arena: Arena, specs: Mapping[str, TensorSpec]) -> None:
        self._arena = arena
        self._specs = specs

    def there(self, name: str) -> Tensor:
        """A copy where it is, [elements]."""
        return self._arena.raw(name)

    @property
    def begin(self) -> int:
        """The address of the first one, on the device."""
        return self._arena.pointer

    @property
    def slots(self) -> Mapping[str, Slot]:
        """Where each lies from there."""
        return self._arena.layout.slots

    @property
    def device(self) -> Any:
        """Where they are."""
        return self._arena.storage.device

    def __getitem__(self, name: str) -> Array:
        spec = self._specs[name]
        raw = np.frombuffer(_bytes(self.there(name)), np.uint8)
        array: Array = raw.view(numpy_dtype(spec.dtype)).reshape(spec.static_shape)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._arena.layout.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._arena.layout.slots)

    def __len__(self) -> int:
        return len(self._arena.layout.slots)


def _bytes(tensor: Tensor) -> bytes:
    host: bytes = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return host


class Places:
    """Where samples are taken, the same for every version.

    Attributes:
        names: all source weights, in the order of rows.
        row: weight -> its row.
        positions: int64 ``[weights, 32]``, flat positions in each weight; -1 is none.
        itemsizes: bytes of an element of each.
        spare: memory of samples that nobody holds any more, and its address.

    Args:
        specs: all source weights.
        positions: weight -> flat positions.
        device: where samples are taken.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], positions: Mapping[str, Array], device: Any) -> None:
        self._device = device
        self.spare: list[tuple[Tensor, int]] = []
        self.names = tuple(specs)
        self.row = {name: row for row, name in enumerate(specs)}
        self.positions = np.full((len(specs), SAMPLES), -1, np.int64)
        self.lengths = [len(positions[name]) for name in specs]
        for row, name in enumerate(specs):
            self.positions[row, : self.lengths[row]] = positions[name]
        self.itemsizes = [numpy_dtype(spec.dtype).itemsize for spec in specs.values()]

    def memory(self) -> tuple[Tensor, int]:
        """New memory for samples of a version, and its address."""
        size = max(1, len(self.names)) * SAMPLES * WIDEST
        made = torch.zeros(size, dtype=torch.uint8, device=self._device)
        return made, int(made.data_ptr())


class Marks(Mapping[str, bytes]):
    """Samples of every source weight of a version, on the device until somebody reads them.

    Attributes:
        there: uint8 ``[weights * 32 * 8]``, each element in 8 bytes; to be written by whoever makes it.
        address: of it.
        places: where they are taken.

    Args:
        places: see above.
    """

    _SPARE = 4

    def __init__(self, places: Places) -> None:
        self.there, self.address = places.spare.pop() if places.spare else places.memory()
        self.places = places

    def __del__(self) -> None:
        # In any thread: no lock may be taken here. A few are enough: as many as versions come and go at once.
        if len(self.places.spare) < self._SPARE:
            self.places.spare.append((self.there, self.address))

    @cached_property
    def _host(self) -> Array:
        array: Array = self.there.cpu().numpy().reshape(-1, SAMPLES, WIDEST).copy()
        return array

    def __getitem__(self, name: str) -> bytes:
        row = self.places.row[name]
        taken: bytes = self._host[row, : self.places.lengths[row], : self.places.itemsizes[row]].tobytes()
        return taken

    def __iter__(self) -> Iterator[str]:
        return iter(self.places.names)

    def __len__(self) -> int:
        return len(self.places.names)


def marks_of(elements: Mapping[str, bytes], places: Places) -> Marks:
    """Samples that were taken on the host, on the device."""
    host = np.zeros((len(places.names), SAMPLES, WIDEST), np.uint8)
    for row, (name, length, width) in enumerate(zip(places.names, places.lengths, places.itemsizes, strict=True)):
        host[row, :length, :width] = np.frombuffer(elements[name], np.uint8).reshape(length, width)
    made = Marks(places)
    made.there[: host.size].copy_(torch.from_numpy(host.reshape(-1)))
    return made


__all__: Sequence[str] = ("SAMPLES", "WIDEST", "Marks", "Places", "PutAside", "marks_of")
