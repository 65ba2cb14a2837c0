"""The network through TorchInductor: operators fused into generated kernels, one compilation for each input shape.

The lowered calls are traced for fixed shapes into one flat graph, so nothing breaks the capture. Compiling takes from
seconds to minutes and holds up the requests meanwhile: it is for few shapes, and it must be asked for
(``CudaOptions.inductor``). Recurrent layers stay with the other ways: a trace would not see our kernels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.cuda.lowering.program import Lowered
from onnx_refit.errors import EngineError, UnsupportedModelError

COMPILER = "inductor"
"""PyTorch's compiler back end."""

_KEPT = 64
_RECURRENT = {"LSTM", "GRU", "RNN"}


class InductorNetwork:
    """A lowered network whose recordings are of compiled code; requests that are not recorded run uncompiled.

    Args:
        lowered: the network.
        operators: the operators it holds.

    Raises:
        UnsupportedModelError: it waits for the device somewhere, or holds recurrent layers.
    """

    def __init__(self, lowered: Lowered, operators: frozenset[str]) -> None:
        if not lowered.graphable:
            raise UnsupportedModelError(f"it cannot be traced: it waits for the device at {lowered.waits_at[0]}")
        if operators & _RECURRENT:
            raise UnsupportedModelError("recurrent layers run in their own kernels")
        self._lowered = lowered
        self.device, self.real = lowered.device, lowered.real
        self.inputs, self.outputs = lowered.inputs, lowered.outputs
        self.graphable = True
        self.together: tuple[tuple[str, ...], ...] = ()
        self.waits_at: list[str] = []
        self._compiled: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()

    def run(self, values: Mapping[str, Tensor], moved: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run the graph, compiled if it is being recorded (``moved`` is given); see ``Lowered.run``."""
        if moved is None:
            return self._lowered.run(values)
        names = list(self.inputs)
        key = tuple(tuple(values[name].shape) for name in names)
        operands = [values[name] for name in names]
        call = self._compiled.get(key)
        if call is None:
            call = self._compiled[key] = self._compile(names, operands, moved)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return dict(zip(self.outputs, call(*operands), strict=True))

    def _compile(self, names: list[str], operands: list[Tensor], moved: dict[str, Tensor]) -> Callable[..., Any]:
        from torch.fx.experimental.proxy_tensor import make_fx

        # Once as it is: what the host decides lies on the device then, and the trace holds it as a constant.
        self._lowered.run(dict(zip(names, operands, strict=True)), moved)

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            results = self._lowered.run(dict(zip(names, tensors, strict=True)), moved)
            return tuple(results[name] for name in self.outputs)

        try:
            traced = make_fx(flat)(*operands)
            compiled: Callable[..., Any] = torch.compile(traced, dynamic=False, backend=COMPILER)
            compiled(*operands)
        except Exception as error:  # PyTorch's compiler raises classes of a dozen modules
            raise EngineError(f"TorchInductor failed: {error}") from error
        return compiled
