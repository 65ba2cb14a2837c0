"""Many small computations of one form as one: the vectors behind each other, the program run once.

A network with fifty folded BatchNormalizations computes the same five elementwise nodes on fifty sets of vectors. Run
node by node that costs several times the copy of all weights; concatenated it costs next to nothing, and every element
comes out the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from onnx_refit.engine.onnxruntime.native import Outlet, make_session, run_plain, session_options
from onnx_refit.moves.addresses import address_of
from onnx_refit.tensors import Array, TensorSpec, is_extension, numpy_dtype, onnx_dtype

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Reciprocal", "Abs", "Exp", "Identity"})
_FEWEST = 2


@dataclass(frozen=True)
class Component:
    """Nodes that share values with each other and with no other node.

    Attributes:
        nodes: in topological order.
        wanted: the values of theirs that are asked for.
    """

    nodes: tuple[NodeProto, ...]
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class _Form:
    """A component with its names taken away: equal for components that compute the same."""

    dtype: str
    steps: tuple[tuple[str, tuple[str, ...], str], ...]
    wanted: tuple[str, ...]
    constants: tuple[tuple[str, bytes, tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Member:
    inputs: tuple[str, ...]
    wanted: tuple[str, ...]
    length: int


class VectorBatch:
    """Components of one form, computed together. One computation at a time.

    Attributes:
        values: every value it computes, in the same memory each time until ``rest``; known after the first time.
    """

    def __init__(self, group: Group, opsets: Sequence[onnx.OperatorSetIdProto]) -> None:
        form, members = group.form, group.members
        self._members = members
        ends = np.cumsum([member.length for member in members])
        self._ranges = [(int(end) - member.length, int(end)) for end, member in zip(ends, members, strict=True)]
        kind = onnx_dtype(form.dtype)
        inputs = [f"i{k}" for k in range(len(members[0].inputs))]
        graph = helper.make_graph(
            [helper.make_node(op_type, list(reads), [output]) for op_type, reads, output in form.steps],
            "vectors",
            [helper.make_tensor_value_info(name, kind, ["n"]) for name in inputs],
            [helper.make_tensor_value_info(name, kind, ["n"]) for name in form.wanted],
            [helper.make_tensor(name, kind, shape, data, raw=True) for name, data, shape in form.constants],
        )
        session = make_session(
            helper.make_model(graph, opset_imports=list(opsets), ir_version=9), session_options(1, arena=False)
        )
        self._session, self._inputs, self._wanted = session, inputs, form.wanted
        self._size, self._dtype = int(ends[-1]), numpy_dtype(form.dtype)
        self._bound: tuple[Outlet, list[Array]] | None = None
        self._direct: tuple[Mapping[str, Array], Outlet, list[Array]] | None = None
        self._results: list[Array] = []
        self.values: Mapping[str, Array] = {}

    def compute(self, sources: Mapping[str, Array], lasting: Mapping[str, Array]) -> None:
        """Bring ``values`` up to date.

        Args:
            sources: what it is computed from.
            lasting: some of them, in the very same memory as long as this is the same mapping: where those of each
                input lie side by side they are read there.
        """
        if not self._results:
            self._results = self._remember()
        if lasting and (self._direct is None or self._direct[0] is not lasting):
            inputs = [
                _side_by_side([lasting.get(m.inputs[k]) for m in self._members]) for k in range(len(self._inputs))
            ]
            found = [array for array in inputs if array is not None]
            self._direct = (lasting, self._bind(found), found) if len(found) == len(inputs) else None
        if lasting and self._direct is not None:
            self._direct[1].run()
            return
        if self._bound is None:
            own = [np.empty(self._size, self._dtype) for _ in self._inputs]
            self._bound = self._bind(own), own
        outlet, copies = self._bound
        for k, joined in enumerate(copies):
            np.concatenate([sources[member.inputs[k]] for member in self._members], out=joined)
        outlet.run()

    def _bind(self, inputs: Sequence[Array]) -> Outlet:
        """The session, reading these and writing the results."""
        outlet = Outlet(self._session)
        for name, array in zip(self._inputs, inputs, strict=True):
            outlet.give(name, array)
        for name, array in zip(self._wanted, self._results, strict=True):
            outlet.take(name, array)
        return outlet

    def _remember(self) -> list[Array]:
        """Memory for the results, with the values in it."""
        results = [np.empty(self._size, self._dtype) for _ in self._wanted]
        self.values = {
            name: result[begin:end]
            for member, (begin, end) in zip(self._members, self._ranges, strict=True)
            for name, result in zip(member.wanted, results, strict=True)
        }
        return results

    def rest(self) -> None:
        """Give the memory back; those who still have ``values`` keep theirs."""
        self._bound, self._direct, self._results, self.values = None, None, [], {}

    @property
    def members(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """The number of each component, and what is wanted of it; none where NumPy has no such type."""
        if not is_extension(self._dtype):
            yield from ((number, member.wanted) for number, member in enumerate(self._members))

    def compute_one(self, number: int, sources: Mapping[str, Array]) -> dict[str, Array]:
        """The values of one component, in memory of their own; EngineError where ONNX Runtime fails."""
        member = self._members[number]
        feeds = {name: sources[source] for name, source in zip(self._inputs, member.inputs, strict=True)}
        return dict(zip(member.wanted, run_plain(self._session, self._wanted, feeds), strict=True))


@dataclass(frozen=True)
class Group:
    """Components of one form."""

    form: _Form
    members: tuple[_Member, ...]

    @property
    def neighbours(self) -> Iterator[str]:
        """What they read, in the order in which it is best to lie side by side."""
        for k in range(len(self.members[0].inputs)):
            yield from (member.inputs[k] for member in self.members)


def groups(
    components: Sequence[Component], specs: Mapping[str, TensorSpec], constants: Mapping[str, TensorProto]
) -> list[Group]:
    """The components that can be computed together.

    Args:
        components: all components.
        specs: the specs of the sources that they read and of the values that are wanted.
        constants: the constants that they read.
    """
    forms: dict[_Form, list[_Member]] = {}
    for component in components:
        found = _form(component, specs, constants)
        if found is not None:
            forms.setdefault(found[0], []).append(found[1])
    return [Group(form, tuple(members)) for form, members in forms.items() if len(members) >= _FEWEST]


def _side_by_side(arrays: Sequence[Array | None]) -> Array | None:
    """One array over all of these, where each begins where the one before ends in the same memory; else None."""
    first = arrays[0]
    memory = None if first is None else first.base
    if first is None or not isinstance(memory, np.ndarray) or memory.dtype != first.dtype or memory.ndim != 1:
        return None
    begin = end = address_of(first) - address_of(memory)
    for array in arrays:
        if array is None or array.base is not memory or address_of(array) - address_of(memory) != end:
            return None
        end += array.nbytes
    if not memory.flags.c_contiguous or not all(array is not None and array.flags.c_contiguous for array in arrays):
        return None
    return memory[begin // memory.itemsize : end // memory.itemsize]


def _form(
    component: Component, specs: Mapping[str, TensorSpec], constants: Mapping[str, TensorProto]
) -> tuple[_Form, _Member] | None:
    names: dict[str, str] = {}
    inputs: list[str] = []
    held: list[tuple[str, bytes, tuple[int, ...]]] = []
    steps: list[tuple[str, tuple[str, ...], str]] = []
    made = {output for node in component.nodes for output in node.output}
    for node in component.nodes:
        if node.op_type not in _ELEMENTWISE or node.domain not in {"", "ai.onnx"} or node.attribute:
            return None
        for name in node.input:
            if name in names:
                continue
            if name in constants:
                array = onnx.numpy_helper.to_array(constants[name])
                if array.size != 1 or array.ndim > 1:
                    return None
                names[name] = f"c{len(held)}"
                held.append((names[name], array.tobytes(), array.shape))
            elif name not in made:
                names[name] = f"i{len(inputs)}"
                inputs.append(name)
        names[node.output[0]] = f"v{len(steps)}"
        steps.append((node.op_type, tuple(names[name] for name in node.input), names[node.output[0]]))
    kinds = {(specs[name].dtype, specs[name].shape) for name in (*inputs, *component.wanted) if name in specs}
    if len(kinds) != 1 or not inputs or not all(name in specs for name in inputs):
        return None
    ((dtype, shape),) = kinds
    if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
        return None
    # Every node must work on vectors: one that reads constants only would give a scalar.
    vectors = {names[name] for name in inputs}
    for _, reads, output in steps:
        if not vectors.intersection(reads):
            return None
        vectors.add(output)
    wanted = tuple(names[name] for name in component.wanted)
    form = _Form(dtype, tuple(steps), wanted, tuple(held))
    return form, _Member(tuple(inputs), component.wanted, shape[0])
