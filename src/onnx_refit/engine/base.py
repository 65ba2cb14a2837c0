"""What backends answer from the compiled model alone, and that a closed one runs nothing."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.evaluate import affected, required
from onnx_refit.tensors import TensorSpec


class CompiledBackend:
    """The part of ``Backend`` that is the same on every device.

    Args:
        name: the engine's name.
        compiled: the portable part of the plan.
    """

    def __init__(self, name: str, compiled: CompiledModel) -> None:
        self._name = name
        self._compiled = compiled
        self._closed = False

    @property
    def name(self) -> str:
        """The engine's name."""
        return self._name

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The model's inputs."""
        return self._compiled.inputs

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The model's outputs."""
        return self._compiled.outputs

    def required(self, changed: frozenset[str]) -> frozenset[str]:
        """The source weights that deriving every engine weight which reads one of ``changed`` needs."""
        return required(self._compiled.program, affected(self._compiled.program, changed))

    @property
    def neighbours(self) -> Sequence[str]:
        """See ``Backend.neighbours``: it is all the same to this one."""
        return ()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
