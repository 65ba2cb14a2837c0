"""Recordings of the network for one set of input shapes, and how many of them are kept."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Tensor

Compute = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Inputs on the device -> outputs on the device, enqueued on the current stream."""


@dataclass(frozen=True)
class Recording:
    """The network recorded for one set of input shapes.

    Attributes:
        inputs: where to write the inputs before a replay.
        outputs: where they lie after it; the next replay overwrites them.
        replay: enqueue the network on the current stream.
        nbytes: device memory it takes.
        packed: the inputs' memory as one piece, uint8; empty where it is not one.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    replay: Callable[[], None]
    nbytes: int
    packed: Packed | None = None


@dataclass(frozen=True)
class Packed:
    """Inputs side by side, so that those of the host travel in one copy.

    Attributes:
        storage: uint8 [bytes] on the device.
        offsets: input name -> bytes from its beginning.
    """

    storage: Tensor
    offsets: Mapping[str, int]


_ALIGNMENT = 256


def pack(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, Any], device: Any
) -> tuple[Packed, dict[str, Tensor]]:
    """Memory for inputs, zeros, and the inputs as tensors over it."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += -(-math.prod(shape) * dtypes[name].itemsize // _ALIGNMENT) * _ALIGNMENT
    storage = torch.zeros(max(1, end), dtype=torch.uint8, device=device)
    tensors = {
        name: storage[offsets[name] : offsets[name] + math.prod(shape) * dtypes[name].itemsize]
        .view(dtypes[name])
        .view(shape)
        for name, shape in shapes.items()
    }
    return Packed(storage, offsets), tensors


def record(compute: Compute, inputs: Mapping[str, Tensor], device: Any, packed: Packed | None = None) -> Recording:
    """Record the network.

    On a GPU this is a CUDA graph: warmed up first on a stream of its own (libraries choose their kernels and allocate
    then), captured after it. On the CPU the "graph" is the same calls again.

    Args:
        compute: the network.
        inputs: inputs of the shapes to record for; the recording takes these tensors as its own.
        device: where.
        packed: the inputs' memory, if it is one piece.
    """
    if torch.device(device).type != "cuda":
        outputs = {name: tensor.clone() for name, tensor in compute(inputs).items()}

        def again() -> None:
            for name, tensor in compute(inputs).items():
                outputs[name].copy_(tensor)

        return Recording(inputs, outputs, again, _nbytes(inputs) + _nbytes(outputs), packed)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute(inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.empty_cache()  # as the capture does itself: only then the difference is what the recording takes
    before = torch.cuda.memory_reserved(device)
    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads go on allocating and uploading while this one records. A stream of this device,
    # because PyTorch's default for captures belongs to the device that captured first.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        recorded = dict(compute(inputs))
    taken = max(0, torch.cuda.memory_reserved(device) - before)
    return Recording(inputs, recorded, graph.replay, taken + _nbytes(inputs), packed)


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Recordings:
    """Recordings by key, the least recently used dropped when they take too much memory; and how often keys came.

    Args:
        budget: bytes; the last recording stays even if it alone takes more.
        after: at which request of a key it is worth recording.
    """

    def __init__(self, budget: int, after: int) -> None:
        self._budget, self._after = budget, max(1, after)
        self._held: OrderedDict[Hashable, Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes that all recordings take."""
        return sum(recording.nbytes for recording in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Recording | None:
        """The recording of a key, now the most recently used."""
        found = self._held.get(key)
        if found is not None and len(self._held) > 1:
            self._held.move_to_end(key)
        return found

    def worthwhile(self, key: Hashable) -> bool:
        """Count a request of this key; whether it has come often enough to be recorded."""
        count = self._seen.pop(key, 0) + 1
        self._seen[key] = count
        while len(self._seen) > 4096:
            self._seen.popitem(last=False)
        return count >= self._after

    def put(self, key: Hashable, recording: Recording) -> None:
        """Keep a recording, and drop what no longer fits."""
        self._held[key] = recording
        while len(self._held) > 1 and self.nbytes > self._budget:
            self._held.popitem(last=False)

    def clear(self) -> None:
        """Drop all recordings."""
        self._held.clear()
