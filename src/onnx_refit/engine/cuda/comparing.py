"""Which weights have the same bytes in two versions: read by one kernel, where samples could not tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.addresses import Addresses
from onnx_refit.engine.cuda.gather import Part, cut, upload

_FILES = ("gather.cu", "halves.cu", "taking.cu")
_THREADS = 256


class Comparison:
    """Tells which of some weights have the same bytes in two places.

    Args:
        names: the weights.
        sizes: bytes of each.
        device: the GPU.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], device: Any) -> None:
        self.names, self._device = tuple(names), device
        pieces = cut([Part(torch.uint8, (size,), size) for size in sizes], [(row, 0) for row in range(len(names))])
        self._pieces = upload(pieces, device)
        self._addresses = Addresses(2 * len(names), device)
        self._found = torch.zeros(max(1, len(names)), dtype=torch.int32, pin_memory=True)
        left = self._addresses.address
        fixed = (left, left + 8 * len(names), self._pieces.data_ptr(), self._found.data_ptr())
        differ = kernels.kernel(_FILES, "differ", device.index)
        self._differ = kernels.Prepared(differ, device, len(pieces), _THREADS, fixed, 0) if len(pieces) else None

    def equal(self, left: Sequence[int], right: Sequence[int]) -> frozenset[str]:
        """Those whose bytes are the same.

        Args:
            left: an address of each, where wide loads are allowed.
            right: another one.
        """
        self._found.zero_()
        if self._differ is not None:
            stream = kernels.current_stream(self._device)
            self._addresses.note([*left, *right])
            self._differ(stream)
            kernels.wait(stream)
        return frozenset(name for name, differs in zip(self.names, self._found.tolist(), strict=False) if not differs)
