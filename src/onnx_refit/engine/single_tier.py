"""The ``FullSpeed`` of engines that have one tier of speed: reached before the weight set exists."""

from __future__ import annotations


class SingleTier:
    """At full speed from the beginning."""

    def wait(self, timeout: float | None = None) -> bool:
        """True, at once."""
        return True

    def done(self) -> bool:
        """True."""
        return True
