"""A graph as a list of PyTorch calls: lowered once, run for any shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto

from onnx_refit.engine.cuda.lowering import elementwise, indexing, linear, passes, recurrent, reducing, shaping
from onnx_refit.engine.cuda.lowering.drafts import Draft, drafts_of
from onnx_refit.engine.cuda.lowering.operators import OPERATORS, Node, Operator, Tensor, torch_dtype
from onnx_refit.errors import EngineError, UnsupportedModelError
from onnx_refit.model.graph import opset
from onnx_refit.tensors import onnx_dtype_name

# Importing these modules fills the table of operators.
_TABLES = (elementwise, indexing, linear, recurrent, reducing, shaping)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Step:
    node: Node
    operator: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    on_host: bool
    last_use: tuple[str, ...]


class Lowered:
    """A graph lowered to PyTorch.

    Values are on the host or on the device, and which is decided here, from the graph alone: what comes from Shape or
    from constants only stays on the host, so that reading it never waits for the device. Where an operator needs on
    the host what only the device knows, the run waits, and ``graphable`` is False: a CUDA graph cannot hold it.

    Args:
        model: the graph. Constants are initializers; it has no sub-graphs.
        device: where it runs, ``"cuda:0"`` or ``"cpu"``.
        real: the dtype that stands for float32.
        recurrent: how LSTM and GRU run, see ``recurrent.choose``.
        weights: engine weight name -> shape, to put operators together (see ``passes``); None leaves them alone.

    Attributes:
        together: weights that are read as one matrix where they lie side by side.

    Raises:
        UnsupportedModelError: it holds an operator without a lowering, named with its node.
    """

    def __init__(
        self,
        model: ModelProto,
        device: str,
        real: Any = torch.float32,
        *,
        recurrent: str = "auto",
        weights: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        graph = model.graph
        self.device = torch.device(device)
        self.real = real
        self.inputs = tuple(value.name for value in graph.input)
        self.outputs = tuple(value.name for value in graph.output)
        self._constants = {tensor.name: _constant(tensor) for tensor in graph.initializer}
        self._on_device: dict[str, Tensor] = {}
        self._hosted = set(self._constants)
        self.waits_at: list[str] = []
        self.together: tuple[tuple[str, ...], ...] = ()
        drafts = self._supported(graph)
        if weights is not None:
            improved = passes.improve(drafts, self.outputs, weights, self._constants)
            drafts, self.together = improved.drafts, improved.together
        self._steps = self._lower(drafts, opset(model) or 1, recurrent)

    @property
    def graphable(self) -> bool:
        """Whether it runs without waiting for the device, so that a CUDA graph can record it."""
        return not self.waits_at

    def _supported(self, graph: GraphProto) -> list[Draft]:
        missing = [
            f"{node.name or node.output[0]} ({node.domain + '.' if node.domain else ''}{node.op_type})"
            for node in graph.node
            if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS or node.op_type.startswith("_")
        ]
        if missing:
            raise UnsupportedModelError(
                f"the engine 'cuda' has no lowering for {len(missing)} nodes: {', '.join(missing[:5])}",
                hint="Use engine='onnxruntime'",
            )
        return drafts_of(graph)

    def _lower(self, drafts: Sequence[Draft], version: int, recurrent: str) -> list[_Step]:
        last = {name: index for index, draft in enumerate(drafts) for name in draft.inputs}
        steps = []
        for index, draft in enumerate(drafts):
            found = OPERATORS[draft.op_type]
            data = [name for place, name in enumerate(draft.inputs) if name and place not in found.host]
            on_host = found.makes_host or all(name in self._hosted for name in data)
            if on_host:
                self._hosted.update(draft.outputs)
            reads = [draft.inputs[place] for place in found.host if place < len(draft.inputs) and draft.inputs[place]]
            asks = any(name not in self._hosted for name in reads)
            if asks or (draft.op_type == "NonZero" and not on_host):
                self.waits_at.append(f"{draft.name} ({draft.op_type})")
            wanted = max((place + 1 for place, name in enumerate(draft.outputs) if name), default=0)
            real = torch.float32 if on_host else self.real
            node = Node(draft.op_type, draft.name, version, wanted, draft.attributes, real, recurrent)
            gone = {name for name in draft.inputs if name and last[name] == index and name not in self.outputs}
            outputs = draft.outputs[:wanted]
            steps.append(_Step(node, found, draft.inputs, outputs, on_host, tuple(gone)))
        return steps

    def run(self, values: Mapping[str, Tensor], moved: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            values: input name -> tensor on the device.
            moved: host values already on the device, by name. A run adds what it moves; a later run for the same
                input shapes can be given the same mapping and then copies nothing from the host, as the recording of
                a CUDA graph demands.

        Returns:
            Output name -> tensor on the device.

        Raises:
            EngineError: an operator failed, with its node.
        """
        held = {} if moved is None else moved
        known: dict[str, Tensor] = dict(values)
        for step in self._steps:
            operands = [self._operand(step, place, name, known, held) for place, name in enumerate(step.inputs)]
            try:
                result = step.operator.function(step.node, *operands)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise EngineError(f"{step.node.op_type} failed: {error}", where=step.node.name) from error
            results = result if isinstance(result, tuple) else (result,)
            known.update((name, value) for name, value in zip(step.outputs, results, strict=False) if name)
            for name in step.last_use:
                known.pop(name, None)
        return {name: self._device_value(name, known, held) for name in self.outputs}

    def _operand(
        self, step: _Step, place: int, name: str, known: Mapping[str, Tensor], held: dict[str, Tensor]
    ) -> Tensor | None:
        if not name:
            return None
        if step.on_host or place in step.operator.host:
            value = self._constants[name] if name in self._constants else known[name]
            if step.operator.makes_host or name in self._hosted:
                return value
            return value.cpu()
        return self._device_value(name, known, held)

    def _device_value(self, name: str, known: Mapping[str, Tensor], held: dict[str, Tensor]) -> Tensor:
        if name not in self._hosted:
            return known[name]
        cache = self._on_device if name in self._constants else held
        found = cache.get(name)
        if found is None:
            value = self._constants[name] if name in self._constants else known[name]
            found = cache[name] = to_real(value, self.real).to(self.device)
        return found


def to_real(value: Tensor, real: Any) -> Tensor:
    """A float32 tensor in the dtype that stands for it; what would become infinite becomes the largest number.

    Models write minus infinity as -3.4e38 or -1e9; in float16 a row of infinities would give NaN in a Softmax.
    """
    if value.dtype is not torch.float32 or real is torch.float32:
        return value
    if real in _HALF:
        limit = torch.finfo(real).max
        value = torch.where(torch.isfinite(value), value.clamp(-limit, limit), value)
    return value.to(real)


def _constant(tensor: onnx.TensorProto) -> Tensor:
    array = onnx.numpy_helper.to_array(tensor)
    dtype = torch_dtype(onnx_dtype_name(tensor.data_type), tensor.name)
    if dtype is torch.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C", copy=True)).reshape(array.shape)


def supported_operators() -> Sequence[str]:
    """The operators of the standard domain that this engine runs itself."""
    return sorted(name for name in OPERATORS if not name.startswith("_"))
