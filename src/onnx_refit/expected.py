"""How long memory is kept for a next refit."""

from __future__ import annotations

import math
import time

_LONGEST = 120.0  # seconds; whoever refits less than once a minute pays for fresh memory


class Expected:
    """Until when to keep memory for the next refit.

    It costs about two copies of its bytes to take memory afresh, and refits mostly come at intervals. So memory is kept
    for twice the last interval: refits every ten seconds then take it afresh once, and once they end it is given back
    soon. Thread-safe: a race shortens or lengthens one interval.

    Attributes:
        until: a time of ``time.monotonic``.
    """

    __slots__ = ("_last", "until")

    def __init__(self) -> None:
        self._last = -math.inf
        self.until = 0.0

    def note(self, least: float) -> None:
        """There is a refit now; for one that comes alone, memory is kept so many seconds."""
        now = time.monotonic()
        kept = 2 * (now - self._last)
        self._last = now
        # Never less than before: a refit notes it several times.
        self.until = max(self.until, now + (kept if least < kept <= _LONGEST else least))

    def seconds_left(self) -> float:
        """Until it may be given back."""
        return self.until - time.monotonic()
