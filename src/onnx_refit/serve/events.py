"""What happens to a model's weights, as events that clients can follow."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

_KEPT = 256
_PENDING = 1024
_HEARTBEAT_SECONDS = 15.0
# Of a run of these only the last is kept: one large upload would push out everything else.
_PROGRESS = "upload"


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        number: counts up from 1.
        kind: ``upload``, ``staging``, ``staged``, ``rejected``, ``canary``, ``committed``, ``discarded``, ...
        data: JSON-able details.
    """

    number: int
    kind: str
    data: dict[str, Any]

    def encode(self) -> bytes:
        """The event in the text/event-stream form (WHATWG HTML, server-sent events)."""
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (self.number, self.kind.encode(), orjson.dumps(self.data))


class EventHub:
    """Publishes events from any thread to any number of followers; the last ones are kept for those who come late."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[Event] = deque(maxlen=_KEPT)
        self._followers: dict[asyncio.Queue[Event | None], asyncio.AbstractEventLoop] = {}
        self._number = 0
        self._closed = False

    def publish(self, kind: str, **data: Any) -> None:
        """Publish an event."""
        with self._lock:
            self._number += 1
            event = Event(self._number, kind, {"time": datetime.now(UTC).isoformat(), **data})
            if kind == _PROGRESS and self._kept and self._kept[-1].kind == kind:
                self._kept.pop()
            self._kept.append(event)
            followers = list(self._followers.items())
        for queue, loop in followers:
            loop.call_soon_threadsafe(_offer, queue, event)

    @property
    def recent(self) -> list[dict[str, Any]]:
        """The last events, oldest first, as JSON-able data."""
        with self._lock:
            return [{"number": event.number, "event": event.kind, **event.data} for event in self._kept]

    def close(self) -> None:
        """End every stream."""
        with self._lock:
            self._closed = True
            followers = list(self._followers.items())
        for queue, loop in followers:
            loop.call_soon_threadsafe(_offer, queue, None)

    async def follow(self, after: int | None) -> AsyncIterator[bytes]:
        """The stream of events after a number (None: from now on), with a comment now and then to keep it open."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(_PENDING)
        with self._lock:
            missed = [event for event in self._kept if after is not None and event.number > after]
            closed = self._closed
            self._followers[queue] = asyncio.get_running_loop()
        try:
            yield b": follow\n\n"
            for event in missed:
                yield event.encode()
            while not closed:
                try:
                    async with asyncio.timeout(_HEARTBEAT_SECONDS):
                        next_event = await queue.get()
                except TimeoutError:
                    yield b": alive\n\n"
                    continue
                if next_event is None:
                    return
                yield next_event.encode()
        finally:
            with self._lock:
                del self._followers[queue]


def _offer(queue: asyncio.Queue[Event | None], event: Event | None) -> None:
    if queue.full():
        # A follower that does not read must not hold memory; it sees the gap in the numbers.
        queue.get_nowait()
    queue.put_nowait(event)
