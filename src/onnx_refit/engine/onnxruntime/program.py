"""Runs a refit program: source weights in, engine weights out, written into buffers that are already there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock

import numpy as np
import onnx

from onnx_refit.engine.onnxruntime.buffers import Buffer
from onnx_refit.engine.onnxruntime.native import Binding, make_session, session_options, wrap
from onnx_refit.errors import EngineError
from onnx_refit.model.graph import reads
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import Array

_SESSIONS_KEPT = 32


class ProgramRunner:
    """The refit program of a compiled model, run by ONNX Runtime. Thread-safe."""

    def __init__(self, compiled: CompiledModel, threads: int) -> None:
        self._model = compiled.program.model
        self._passthrough = compiled.program.passthrough
        self._sources = {
            **{name: frozenset({source}) for name, source in compiled.program.passthrough.items()},
            **compiled.program.dependencies,
        }
        self._threads = threads
        self._sessions: OrderedDict[frozenset[str], tuple[Binding, tuple[str, ...]]] = OrderedDict()
        self._lock = Lock()

    def sources_of(self, engine_weight: str) -> frozenset[str]:
        """The source weights that an engine weight is computed from."""
        return self._sources[engine_weight]

    def affected(self, changed: frozenset[str]) -> frozenset[str]:
        """The engine weights that read one of these source weights."""
        return frozenset(name for name, sources in self._sources.items() if sources & changed)

    def run(self, sources: Mapping[str, Array], targets: Mapping[str, Buffer]) -> None:
        """Compute these engine weights into their buffers; EngineError where a computation fails."""
        computed = []
        for name, buffer in targets.items():
            source = self._passthrough.get(name)
            if source is None:
                computed.append(name)
            else:
                np.copyto(buffer.array, sources[source])
        if computed:
            with self._lock:
                binding, inputs = self._session(computed)
                try:
                    binding.run_into(
                        ((name, wrap(np.ascontiguousarray(sources[name]))) for name in inputs),
                        ((name, targets[name].value) for name in computed),
                    )
                except Exception as error:  # onnxruntime raises a dozen unrelated classes
                    raise EngineError(f"deriving engine weights failed: {error}") from error

    def _session(self, outputs: Iterable[str]) -> tuple[Binding, tuple[str, ...]]:
        key = frozenset(outputs)
        found = self._sessions.get(key)
        if found is None:
            if self._model is None:
                raise EngineError("the refit program computes nothing", where=", ".join(sorted(key)))
            model = restricted(self._model, key)
            session = make_session(model, session_options(self._threads))
            found = Binding(session, {}, ()), tuple(value.name for value in model.graph.input)
            self._sessions[key] = found
            while len(self._sessions) > _SESSIONS_KEPT:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return found


def restricted(model: onnx.ModelProto, outputs: frozenset[str]) -> onnx.ModelProto:
    """The part of a model that computes these of its outputs (top-level graph; sub-graphs read inputs only)."""
    graph = model.graph
    live = set(outputs)
    nodes = []
    for node in reversed(graph.node):
        if any(name in live for name in node.output):
            live.update(reads(node))
            nodes.append(node)
    part = onnx.helper.make_graph(
        nodes[::-1],
        graph.name,
        [value for value in graph.input if value.name in live],
        [value for value in graph.output if value.name in outputs],
        [tensor for tensor in graph.initializer if tensor.name in live],
    )
    return onnx.helper.make_model(
        part, opset_imports=list(model.opset_import), ir_version=model.ir_version, functions=list(model.functions)
    )
