"""The refit program on the device: lowered like any graph, as much of it as the changed weights need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.cuda.lowering.program import Lowered
from onnx_refit.errors import UnsupportedModelError
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.evaluate import run_model, select

_KEPT = 32


class Recipes:
    """Computes engine weights from source weights on the device. Not thread-safe: refits come one at a time.

    Args:
        compiled: the plan's portable part.
        device: where to compute. Arithmetic is in the sources' own dtypes; the cast to the engine's comes after it.
    """

    def __init__(self, compiled: CompiledModel, device: str) -> None:
        self._program = compiled.program
        self._device = device
        self._lowered: OrderedDict[frozenset[str], tuple[Any, Lowered | None]] = OrderedDict()

    def run(self, wanted: frozenset[str], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Engine weight name -> tensor on the device.

        Args:
            wanted: engine weights that are computed, not passed through.
            sources: source weight name -> tensor on the device; at least what the wanted ones read.

        Raises:
            EngineError: an operator of the program failed.
        """
        if not wanted:
            return {}
        model, lowered = self._lower(wanted)
        names = [value.name for value in model.graph.input]
        given = {name: sources[name] for name in names}
        if lowered is not None:
            return lowered.run(given)
        host = {name: tensor.cpu().numpy() for name, tensor in given.items()}
        return {name: torch.from_numpy(array).to(self._device) for name, array in run_model(model, host).items()}

    def on_host(self, wanted: frozenset[str]) -> bool:
        """Whether these are computed on the host, because the program holds an operator without a lowering."""
        return bool(wanted) and self._lower(wanted)[1] is None

    def _lower(self, wanted: frozenset[str]) -> tuple[Any, Lowered | None]:
        found = self._lowered.get(wanted)
        if found is None:
            model = select(self._program, wanted).model
            try:
                found = model, Lowered(model, self._device)  # type: ignore[arg-type]
            except UnsupportedModelError:
                found = model, None
            self._lowered[wanted] = found
            while len(self._lowered) > _KEPT:
                self._lowered.popitem(last=False)
        self._lowered.move_to_end(wanted)
        return found
