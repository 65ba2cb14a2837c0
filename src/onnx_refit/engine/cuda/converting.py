"""Tensors in other orders and dtypes made dense, as declared, for the kernels that take weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.addresses import Addresses
from onnx_refit.engine.cuda.arena import Arena, Layout
from onnx_refit.engine.cuda.attached import Attached
from onnx_refit.engine.cuda.gather import KINDS, upload
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.lowering.pointwise import walk_of
from onnx_refit.tensors import TensorSpec

_FILES = ("gather.cu", "halves.cu", "taking.cu")
_THREADS = 256
_CONVERSION = np.dtype(
    [("to", "<u8"), ("source", "<u4"), ("target", "<u4"), ("sizes", "<u4", 4), ("strides", "<i8", 4)]
)
_STRETCH = 8 << 10  # elements


@dataclass(frozen=True)
class Made:
    """Weights that were made dense, to be held until they were read.

    Attributes:
        arena: those that were converted.
        computed: those that PyTorch's operators made.
        addresses: of all.
    """

    arena: Arena
    computed: Mapping[str, Tensor]
    addresses: Mapping[str, int]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, flat or in their shapes."""
        return {**{name: self.arena.raw(name) for name in self.arena.layout.slots}, **self.computed}


class Conversions:
    """Makes dense weights of the declared dtypes out of tensors in other orders and dtypes, by one kernel.

    Args:
        attached: the weights.
        specs: as they are declared.
        device: the GPU.
    """

    def __init__(self, attached: Attached, specs: Mapping[str, TensorSpec], device: Any) -> None:
        self._device = device
        self._views = [one for one in attached.lying if not one.dense and one.tensor is not None]
        self._computed = [one for one in attached.lying if one.tensor is None]
        self._layout = Layout([specs[one.name] for one in self._views], torch.float32)
        rows, stretches = np.zeros(len(self._views), _CONVERSION), []
        for row, one in enumerate(self._views):
            walk = walk_of([one.shape], [one.strides])
            assert walk is not None  # else it were computed
            target = torch_dtype(specs[one.name].dtype, one.name)
            plain = 16 + target.itemsize
            casts = one.dtype is not target or target.is_floating_point
            kinds = (KINDS.get(one.dtype, plain), KINDS.get(target, plain)) if casts else (plain, plain)
            rows[row] = (self._layout.slots[one.name].offset, *kinds, walk.sizes, walk.strides[0])
            size = specs[one.name].size
            stretches += [(row, begin, min(_STRETCH, size - begin), 0) for begin in range(0, size, _STRETCH)]
        self._rows = upload(rows, device)
        self._stretches = upload(np.array(stretches, np.uint32), device)
        self._count = len(stretches)
        self._addresses = Addresses(len(self._views), device)
        pointers = dict(zip(attached.names, attached.pointers, strict=True))
        self._pointers = [pointers[one.name] for one in self._views]
        self._kernel = kernels.kernel(_FILES, "convert", device.index)

    def enqueue(self, attached: Attached, tensors: Sequence[Any], found: int) -> Made:
        """Enqueue it all; what is made must be held until it was read.

        Args:
            attached: the weights.
            tensors: what the weights lie in.
            found: the address of what kernels say.
        """
        arena = Arena(self._layout, self._device)
        begin = int(arena.storage.data_ptr())
        addresses = {name: begin + slot.offset for name, slot in self._layout.slots.items()}
        if self._count:
            self._addresses.note(self._pointers)
            tables = (self._addresses.address, self._rows.data_ptr(), self._stretches.data_ptr())
            arguments = (*tables, begin, int(attached.rounding), found)
            kernels.launch(self._kernel, self._device, (self._count,), (_THREADS,), arguments)
        with torch.no_grad():
            computed = {one.name: attached.value(one, tensors) for one in self._computed}
        return Made(arena, computed, addresses | {name: value.data_ptr() for name, value in computed.items()})
