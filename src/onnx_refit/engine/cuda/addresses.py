"""Addresses of tensors, where kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Addresses:
    """Addresses that kernels read, on a GPU; sent only when they change.

    Args:
        count: how many.
        device: the GPU.

    Attributes:
        address: where they are.
        noted: those that are there.
    """

    def __init__(self, count: int, device: Any) -> None:
        self.device = device
        self._host = torch.zeros(max(1, count), dtype=torch.int64, pin_memory=True)
        self._memory = self._host.numpy()
        self._there = self._host.to(device)
        self.noted: Sequence[int] = ()
        self.address = self._there.data_ptr()

    def note(self, pointers: Sequence[int]) -> None:
        """Enqueue these. What was enqueued before must have been waited for."""
        if pointers is not self.noted and pointers != self.noted:
            self._memory[: len(pointers)] = pointers
            self._there.copy_(self._host, non_blocking=True)
        self.noted = pointers
