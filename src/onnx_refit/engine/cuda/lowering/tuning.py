"""Which of several ways to compute the same thing is fastest on this device for these shapes: timed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_REPEATS = 20
_ROUNDS = 3

_local = threading.local()
_chosen: dict[tuple[Any, ...], str] = {}
"""What was found in this process, by device and key: the same shapes then always run the same way."""


@contextmanager
def allowed() -> Iterator[None]:
    """Let the calls inside be timed: while a network is warmed up for its recording."""
    _local.allowed = True
    try:
        yield
    finally:
        _local.allowed = False


def fastest(key: Hashable, ways: Mapping[str, Callable[[], Any]], like: Any) -> Any:
    """The result of the fastest way; of the first one where nothing was timed.

    Args:
        key: what the times depend on, beside the device.
        ways: name -> a call.
        like: a tensor on the device.
    """
    if len(ways) == 1 or not like.is_cuda:
        return next(iter(ways.values()))()
    name = torch.cuda.get_device_name(like.device)
    switches = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    place = (name, switches, key)
    best = _chosen.get(place)
    if best is None and getattr(_local, "allowed", False) and not torch.cuda.is_current_stream_capturing():
        best = _chosen[place] = _measure(ways)
    return ways[best if best is not None else next(iter(ways))]()


def _measure(ways: Mapping[str, Callable[[], Any]]) -> str:
    seconds: dict[str, float] = {}
    for name, call in ways.items():
        try:
            seconds[name] = _replayed(call)
        except RuntimeError:  # a way that the library refuses for these shapes is no way
            continue
    return min(seconds, key=seconds.__getitem__) if seconds else next(iter(ways))


def _replayed(call: Callable[[], Any]) -> float:
    """Milliseconds of some repetitions inside a CUDA graph, as the network will run: launching them counts little."""
    call()
    call()
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for _ in range(_REPEATS):
            call()
    finally:
        graph.capture_end()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken: list[float] = []
    for _ in range(_ROUNDS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return min(taken)


def decisions() -> dict[str, str]:
    """What was chosen, in words, for reports."""
    return {str(key): way for key, way in _chosen.items()}
