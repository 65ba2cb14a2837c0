"""A stream made current, and waited for, by a few calls: PyTorch's context managers cost 15 us a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_HIGH = -2  # requests go before what a refit does where both want the device


@contextmanager
def on_device(device: Any) -> Iterator[None]:
    """Make a device current, where it is not."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        yield
        return
    with torch.cuda.device(device):
        yield


class OwnStream:
    """A stream of a device that is current inside ``with``; nothing on the CPU. Not re-entrant: guard it by a lock.

    Args:
        device: the device.
    """

    def __init__(self, device: Any) -> None:
        self.stream: Any = torch.cuda.Stream(device, priority=_HIGH) if device.type == "cuda" else None
        self._default: Any = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._device = device
        self._events: list[Any] = []
        self._before: tuple[int, int, int] = (0, 0, 0)
        self._before_device = 0

    def __enter__(self) -> OwnStream:
        if self.stream is not None:
            self._before_device = torch._C._cuda_getDevice()
            self._before = torch._C._cuda_getCurrentStream(self._device.index)
            _make_current((self.stream.stream_id, self.stream.device_index, self.stream.device_type))
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            _make_current(self._before)
            if self._before_device != self._device.index:
                torch._C._cuda_setDevice(self._before_device)

    def mark(self) -> Any:
        """An event at the stream's end, to be given to ``wait``; None on the CPU. Under the lock."""
        if self.stream is None:
            return None
        try:
            event = self._events.pop()
        except IndexError:
            event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def wait(self, event: Any) -> None:
        """Wait for an event; in any thread, without the lock."""
        if event is not None:
            event.synchronize()
            self._events.append(event)

    def follow_current(self) -> None:
        """Let the stream wait for what the caller has enqueued on its own current stream."""
        if self.stream is not None:
            current = self._default
            if torch._C._cuda_getCurrentStream(self._device.index)[0] != current.stream_id:
                current = torch.cuda.current_stream(self._device)
            if not current.query():  # asking costs a tenth of waiting
                self.stream.wait_stream(current)


def _make_current(stream: tuple[int, int, int]) -> None:
    number, device, kind = stream
    torch._C._cuda_setStream(stream_id=number, device_index=device, device_type=kind)
