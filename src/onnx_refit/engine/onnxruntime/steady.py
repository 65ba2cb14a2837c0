"""What is the same at each refit that brings its small weights in the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.crew import Task
from onnx_refit.engine.onnxruntime.writers import Writer
from onnx_refit.tensors import Array


class Steady:
    """What is the same at each refit that brings its small weights in the same memory.

    Attributes:
        lasting: the source weights in that memory.
        rest: the other source weights.
        values: the computed values that are always in the same memory.
        flats: both, flat, by their prefixed names.
        writers: the engine weights that read nothing else.
    """

    def __init__(
        self,
        lasting: Mapping[str, Array],
        rest: Sequence[str],
        values: Mapping[str, Array],
        flats: Mapping[str, Array],
        writers: frozenset[str],
    ) -> None:
        self.lasting, self.rest, self.values, self.flats, self.writers = lasting, rest, values, flats, writers

    def tasks(self, writer: Writer, storage: Storage) -> list[Task]:
        """What writes one of the writers' engine weights, made once for each storage."""
        if storage.steady is None or storage.steady[0] is not self:
            storage.steady = self, writer.tasks(self.flats, storage)
        return storage.steady[1]


UNSTEADY = Steady({}, (), {}, {}, frozenset())
"""Nothing is the same."""
