"""Computes the values of a refit program that are more than rearrangements, with ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

import onnx
from onnx import NodeProto

from onnx_refit.engine.onnxruntime.native import Binding, make_session, session_options
from onnx_refit.engine.onnxruntime.vectors import Component, Group, VectorBatch, groups
from onnx_refit.errors import EngineError
from onnx_refit.model.graph import reads
from onnx_refit.tensors import Array, TensorSpec, spec_of_value_info, value_info_of

_NOTHING: Mapping[str, Array] = {}


class Program:
    """The computed part of a refit program. One computation at a time.

    The values are grouped by what they share: a change of few sources computes few groups, in the session of all that
    have the same form, or in one of their own, made when first needed; a change of all runs one session for all.

    Attributes:
        lasting: the values that every computation of all writes into the same memory; known after the first, and
            in memory of another mapping after each ``rest``.

    Args:
        model: the refit program's graph, or None where nothing is computed.
        values: the values of it that are wanted, with their specs.
        threads: threads of its sessions.
    """

    def __init__(self, model: onnx.ModelProto | None, values: Mapping[str, TensorSpec], threads: int) -> None:
        self._model = model
        self._values = values
        self._threads = threads
        self._lock = threading.Lock()
        self._sessions: dict[frozenset[str], tuple[Binding, tuple[str, ...], tuple[str, ...]]] = {}
        self._inputs: dict[str, frozenset[str]] = {}
        self._groups: dict[str, frozenset[str]] = {}
        self._batches: list[VectorBatch] | None = None
        self._members: dict[frozenset[str], tuple[VectorBatch, int]] = {}
        self.lasting: Mapping[str, Array] = {}
        self._alike: list[Group] = []
        if model is not None and values:
            self._sort(restricted(model, [values[name] for name in sorted(values)]))

    def sources_of(self, value: str) -> frozenset[str]:
        """The source weights that a value is computed from."""
        return self._inputs[value]

    def needed_for(self, value: str) -> frozenset[str]:
        """The source weights that computing a value takes: those of every value it is computed together with."""
        return frozenset().union(*(self._inputs[name] for name in self._groups[value]))

    @property
    def neighbours(self) -> Sequence[str]:
        """Source weights that are computed with together, in the order in which they are best given side by side."""
        return list(dict.fromkeys(name for group in self._alike for name in group.neighbours))

    def compute(
        self, wanted: Collection[str], sources: Mapping[str, Array], lasting: Mapping[str, Array] = _NOTHING
    ) -> Mapping[str, Array]:
        """Values by name (at least the wanted ones): those in ``lasting`` are good until the next call.

        Args:
            wanted: names of values.
            sources: what they are computed from.
            lasting: some of them, in the very same memory as long as this is the same mapping.

        Raises:
            EngineError: ONNX Runtime fails, or a source is missing.
        """
        if not wanted:
            return {} if self._values else self.lasting
        results: dict[str, Array] = {}
        with self._lock:
            try:
                if len(wanted) == len(self._values):
                    for batch in self._all_batches():
                        batch.compute(sources, lasting)
                    if not self.lasting:
                        self.lasting = {n: array for batch in self._all_batches() for n, array in batch.values.items()}
                    if len(self.lasting) == len(self._values):
                        return self.lasting
                    results.update(self.lasting)
                    groups = {frozenset(self._values.keys() - results.keys())}
                else:
                    groups = {self._groups[name] for name in wanted}
                    self._all_batches()
                for group in groups:
                    member = self._members.get(group)
                    if member is not None:
                        batch, number = member
                        results.update(batch.compute_one(number, sources))
                    elif group:
                        binding, inputs, outputs = self._session(group)
                        made = binding.run((name, sources[name]) for name in inputs)
                        results.update(zip(outputs, made, strict=True))
            except KeyError as error:
                raise EngineError("a source weight that is needed was not given", where=error.args[0]) from error
            except Exception as error:  # onnxruntime raises a dozen unrelated classes
                raise EngineError(f"computing engine weights failed: {error}") from error
        return results

    def rest(self) -> None:
        """Keep no memory for the next computation."""
        with self._lock:
            for batch in self._batches or ():
                batch.rest()
            self.lasting = {}

    def _all_batches(self) -> list[VectorBatch]:
        if self._batches is None:
            assert self._model is not None
            opsets = list(self._model.opset_import)
            self._batches = [VectorBatch(group, opsets) for group in self._alike]
            self._members = {
                frozenset(wanted): (batch, number) for batch in self._batches for number, wanted in batch.members
            }
        return self._batches

    def _session(self, group: frozenset[str]) -> tuple[Binding, tuple[str, ...], tuple[str, ...]]:
        found = self._sessions.get(group)
        if found is None:
            assert self._model is not None
            model = restricted(self._model, [self._values[name] for name in sorted(group)])
            session = make_session(model, session_options(self._threads, spinning=False))
            outputs = tuple(value.name for value in model.graph.output)
            found = Binding(session, {}, outputs), tuple(v.name for v in model.graph.input), outputs
            self._sessions[group] = found
        return found

    def _sort(self, model: onnx.ModelProto) -> None:
        """Find what each value reads, and which values share a node."""
        needs: dict[str, frozenset[str]] = {}  # value -> the graph inputs it depends on
        owner: dict[str, str] = {}  # node output -> representative of its group
        sources = {value.name for value in model.graph.input}
        constants = {tensor.name for tensor in model.graph.initializer}

        def find(name: str) -> str:
            while owner[name] != name:
                owner[name] = owner[owner[name]]
                name = owner[name]
            return name

        for node in model.graph.node:
            read = [name for name in reads(node) if name not in constants]
            direct = frozenset(name for name in read if name in sources)
            depends = direct.union(*(needs.get(name, frozenset()) for name in read))
            outputs = [name for name in node.output if name]
            for name in outputs:
                owner[name] = name
                needs[name] = depends
            for name in (*outputs, *(n for n in read if n in owner)):
                owner[find(name)] = find(outputs[0])
        members: dict[str, set[str]] = {}
        for name in self._values:
            members.setdefault(find(name), set()).add(name)
        nodes: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            nodes.setdefault(find(next(name for name in node.output if name)), []).append(node)
        components = [Component(tuple(nodes[root]), tuple(sorted(names))) for root, names in members.items()]
        specs = {value.name: spec_of_value_info(value) for value in model.graph.input}
        self._alike = groups(components, {**specs, **self._values}, {t.name: t for t in model.graph.initializer})
        self._inputs = {name: needs[name] for name in self._values}
        self._groups = {name: frozenset(members[find(name)]) for name in self._values}


def restricted(model: onnx.ModelProto, outputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """The part of a model that computes these of its values."""
    graph = model.graph
    live = {spec.name for spec in outputs}
    nodes = []
    for node in reversed(graph.node):
        if any(name in live for name in node.output):
            live.update(reads(node))
            nodes.append(node)
    part = onnx.helper.make_graph(
        nodes[::-1],
        graph.name,
        [value for value in graph.input if value.name in live],
        [value_info_of(spec) for spec in outputs],
        [tensor for tensor in graph.initializer if tensor.name in live],
    )
    return onnx.helper.make_model(
        part, opset_imports=list(model.opset_import), ir_version=model.ir_version, functions=list(model.functions)
    )
