"""Seconds of each stage of a refit."""

from __future__ import annotations

import time
from types import TracebackType


class timed:  # noqa: N801 - reads as a function
    """Add the seconds that a block takes to an entry of a dict."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = time.perf_counter() - self._started
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + elapsed
