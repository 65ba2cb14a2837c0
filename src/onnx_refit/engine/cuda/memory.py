"""Device memory that goes from a version that is gone to the next refit, past PyTorch's allocator.

The allocator is a call through its dispatcher and back at each refit, for memory of the very same size: of a small
model's refit that is a tenth.
"""

from __future__ import annotations

from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Tensor

_LARGEST = 128 << 20
"""Bytes up to which memory is worth keeping: of larger ones nobody notices the allocator."""


class Memory:
    """Bytes on a device. Once nobody holds this object, the next refit may write to them.

    So whoever reads them without holding it, or without waiting for what is queued, says so by ``keep``: then they go
    back to PyTorch's allocator, which knows of other tensors over them and of streams that read them.

    Attributes:
        storage: uint8, the bytes.
        address: of the first.
    """

    __slots__ = ("_kept", "_spare", "address", "storage")

    def __init__(self, storage: Tensor, address: int, spare: list[tuple[Tensor, int]]) -> None:
        self.storage = storage
        self.address = address
        self._spare = spare
        self._kept = False

    def keep(self) -> None:
        """Not for the next refit."""
        self._kept = True

    def __del__(self) -> None:
        # In any thread: no lock may be taken here. Two at once may both find the list empty: then there are two.
        if not self._kept and not self._spare:
            self._spare.append((self.storage, self.address))


class Recycled:
    """Memory of one size, what is free of it first. Thread-safe.

    Args:
        nbytes: of each.
        device: where.
    """

    def __init__(self, nbytes: int, device: Any) -> None:
        self._nbytes = nbytes
        self._device = device
        self._spare: list[tuple[Tensor, int]] = []

    def memory(self) -> Memory:
        """Memory that nobody reads or writes."""
        try:
            storage, address = self._spare.pop()
        except IndexError:
            storage = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
            address = int(storage.data_ptr())
        made = Memory(storage, address, self._spare)
        if self._nbytes > _LARGEST:
            made.keep()
        return made

    def clear(self) -> None:
        """Give back what is free."""
        self._spare.clear()
