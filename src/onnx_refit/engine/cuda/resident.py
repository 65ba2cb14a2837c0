"""Source weights that lie on this device, looked at and put aside there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Arena, Layout
from onnx_refit.engine.cuda.gather import Copies, Looks, Part, Table
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.protocol import Seen
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype


class Resident:
    """Looks at source weights on one device. Not thread-safe: refits come one at a time.

    Args:
        specs: every source weight.
        device: where.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], device: Any) -> None:
        self._specs = specs
        self._device = device
        self._kernels = device.type == "cuda" and kernels.available()
        self._names = list(specs)
        self._looks: Looks | None = None
        self._aside: tuple[tuple[str, ...], Layout, Copies] | None = None

    @cached_property
    def _table(self) -> Table:
        specs = self._specs.values()
        parts = [Part(torch_dtype(spec.dtype, spec.name), spec.static_shape, spec.nbytes) for spec in specs]
        return Table(parts, self._device)

    def holds(self, values: Mapping[str, object]) -> bool:
        """See ``InPlace.holds``."""
        if self._kernels and values.keys() == self._specs.keys():
            return self._table.fits(list(map(values.__getitem__, self._names)))
        return values.keys() == self._specs.keys() and all(
            isinstance(value, torch.Tensor)
            and value.device == self._device
            and value.dtype is torch_dtype(self._specs[name].dtype, name)
            and value.shape == self._specs[name].static_shape
            and value.is_contiguous()
            for name, value in values.items()
        )

    def look(self, values: Mapping[str, Any], positions: Mapping[str, Array]) -> dict[str, Seen]:
        """See ``InPlace.look``; the positions of a weight are the same at every call."""
        if self._kernels and self._table.note(list(map(values.__getitem__, self._names))):
            if self._looks is None:
                self._looks = Looks(self._table, [positions[name] for name in self._names])
            finite, elements = self._looks.run()
            return dict(zip(self._names, map(Seen, finite, elements), strict=True))
        return {name: _look(values[name].detach(), positions[name]) for name in self._names}

    def put_aside(self, values: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Array]:
        """See ``InPlace.put_aside``."""
        if not self._kernels:
            return PutAside({name: values[name].detach().clone() for name in names}, self._specs)
        wanted = tuple(sorted(names))
        if self._aside is None or self._aside[0] != wanted:
            layout = Layout([self._specs[name] for name in wanted], torch.float32)
            index = {name: row for row, name in enumerate(self._names)}
            places = [(index[name], layout.slots[name].offset) for name in wanted]
            self._aside = wanted, layout, Copies(self._table, places)
        _, layout, copies = self._aside
        arena = Arena(layout, self._device)
        if not self._table.note(list(map(values.__getitem__, self._names))):
            return PutAside({name: values[name].detach().clone() for name in names}, self._specs)
        copies.enqueue(arena.storage)
        kernels.synchronize(self._device)
        return PutAside(arena, self._specs)


def _look(tensor: Tensor, positions: Array) -> Seen:
    finite = bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True
    taken = tensor.reshape(-1)[torch.from_numpy(positions).to(tensor.device)]
    return Seen(finite, _bytes(taken))


def _bytes(tensor: Tensor) -> bytes:
    host: bytes = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return host


class PutAside(Mapping[str, Array]):
    """Copies of weights on a device; reading one brings it to the host.

    Args:
        held: the copies, each a tensor or all in an arena.
        specs: of the weights.
    """

    def __init__(self, held: Mapping[str, Tensor] | Arena, specs: Mapping[str, TensorSpec]) -> None:
        self._held = held
        self._specs = specs

    def __getitem__(self, name: str) -> Array:
        spec = self._specs[name]
        raw = np.frombuffer(
            _bytes(self._held.raw(name) if isinstance(self._held, Arena) else self._held[name]), np.uint8
        )
        array: Array = raw.view(numpy_dtype(spec.dtype)).reshape(spec.static_shape)
        return array

    def _names(self) -> Mapping[str, object]:
        return self._held.layout.slots if isinstance(self._held, Arena) else self._held

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors of one size have the same bytes."""
    left, right = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return bool(torch.equal(left, right))


__all__: Sequence[str] = ("PutAside", "Resident", "same_bits")
