"""Source weights that lie on this device, looked at and put aside there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.gather import Looks, Part, Table
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
        self._looks: tuple[tuple[str, ...], Table, Looks] | None = None

    def holds(self, values: Mapping[str, object]) -> bool:
        """See ``InPlace.holds``."""
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
        names, tensors = tuple(values), [value.detach() for value in values.values()]
        if self._device.type == "cuda" and kernels.available():
            if self._looks is None or self._looks[0] != names:
                specs = [self._specs[name] for name in names]
                parts = [Part(torch_dtype(spec.dtype, spec.name), spec.static_shape, spec.nbytes) for spec in specs]
                table = Table(parts, self._device)
                self._looks = names, table, Looks(table, [positions[name] for name in names])
            _, table, looks = self._looks
            if table.note(tensors):
                found = zip(*looks.run(), strict=True)
                return {name: Seen(*seen) for name, seen in zip(names, found, strict=True)}
        return {name: _look(tensor, positions[name]) for name, tensor in zip(names, tensors, strict=True)}

    def put_aside(self, values: Mapping[str, Any]) -> PutAside:
        """See ``InPlace.put_aside``."""
        with torch.no_grad():
            return PutAside({name: value.detach().clone() for name, value in values.items()}, self._specs)


def _look(tensor: Tensor, positions: Array) -> Seen:
    finite = bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True
    taken = tensor.reshape(-1)[torch.from_numpy(positions).to(tensor.device)]
    return Seen(finite, _bytes(taken))


def _bytes(tensor: Tensor) -> bytes:
    host: bytes = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return host


class PutAside(Mapping[str, Array]):
    """Copies of weights on a device; reading one brings it to the host."""

    def __init__(self, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
        self._tensors = tensors
        self._specs = specs

    def __getitem__(self, name: str) -> Array:
        spec = self._specs[name]
        raw = np.frombuffer(_bytes(self._tensors[name]), np.uint8)
        array: Array = raw.view(numpy_dtype(spec.dtype)).reshape(spec.static_shape)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors of one size have the same bytes."""
    left, right = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return bool(torch.equal(left, right))


__all__: Sequence[str] = ("PutAside", "Resident", "same_bits")
