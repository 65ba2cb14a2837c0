"""Weights of stored versions, as the transport ships them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from onnx_refit.plan.plan import Plan
from onnx_refit.serve.cluster.book import Book
from onnx_refit.serve.cluster.incoming import Transport
from onnx_refit.serve.cluster.parcel import pack

_LINGER_SECONDS = 60.0


@dataclass
class _Shipped:
    """Weights of a version that the transport has already, and when they were last of use (monotonic clock)."""

    version: int
    weights: object
    used: float


class Depot:
    """Ships a version when the first replica needs it, and keeps it a while for the next ones.

    Args:
        plan: names the weights.
        book: has the versions.
        transport: how weights travel.
    """

    def __init__(self, plan: Plan, book: Book, transport: Transport) -> None:
        self._names = [source.spec.name for source in plan.compiled.sources]
        self._book, self._transport = book, transport
        self._shipped: _Shipped | None = None
        # Several replicas may need it at the same time, and it travels once.
        self._lock = asyncio.Lock()

    async def weights(self, version: int) -> object:
        """The weights of a version; VersionError if there is none, StoreError if they are damaged."""
        async with self._lock:
            if self._shipped is None or self._shipped.version != version:
                stored = self._book.stored(version)
                shipped = await asyncio.to_thread(lambda: self._transport.ship(pack(stored.read_many(self._names))))
                self._shipped = _Shipped(version, shipped, 0.0)
            self._shipped.used = time.monotonic()
            return self._shipped.weights

    def tidy(self) -> None:
        """Let go of what was of no use for a minute, or is not what answers now."""
        shipped = self._shipped
        if shipped is not None and (
            time.monotonic() > shipped.used + _LINGER_SECONDS or shipped.version != self._book.target.version
        ):
            self._shipped = None
