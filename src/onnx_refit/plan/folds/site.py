"""One graph under rewriting: its nodes, who makes and who reads each value, and what is known of shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import GraphProto, NodeProto

from onnx_refit.model.graph import reads
from onnx_refit.plan.draft import Draft
from onnx_refit.plan.program import ProgramBuilder
from onnx_refit.tensors import TensorSpec


def operator(node: NodeProto) -> str:
    """The node's operator: its name, behind its domain where that is not the default one."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


class Site:
    """An editable view of one graph of a draft; ``flush`` writes it back.

    Args:
        draft: the draft that the graph belongs to.
        graph: the main graph or a sub-graph.
        specs: what shape inference found, by value name, over all graphs.
    """

    def __init__(self, draft: Draft, graph: GraphProto, specs: Mapping[str, TensorSpec]) -> None:
        self.draft = draft
        self.graph = graph
        self.specs = dict(specs)
        self.outputs = {value.name for value in graph.output}
        self.modified = False
        self._makers: dict[str, NodeProto] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        self._slots: list[list[NodeProto]] = [[node] for node in graph.node]  # what stands where each node stood
        self._slot_of: dict[str, list[NodeProto]] = {}
        for slot in self._slots:
            self._slot_of[slot[0].name] = slot
            self._register(slot[0])

    @property
    def program(self) -> ProgramBuilder:
        """The refit program."""
        return self.draft.program

    def _register(self, node: NodeProto) -> None:
        for output in node.output:
            if output:
                self._makers[output] = node
        for name in reads(node):
            self._readers.setdefault(name, []).append(node)

    def _forget(self, node: NodeProto) -> None:
        for output in node.output:
            if self._makers.get(output) is node:
                del self._makers[output]
        for name in reads(node):
            self._readers[name] = [reader for reader in self._readers[name] if reader is not node]

    def maker(self, name: str) -> NodeProto | None:
        """The node of this graph that makes the value."""
        return self._makers.get(name)

    def readers(self, name: str) -> Sequence[NodeProto]:
        """The nodes of this graph that read the value, each once a read."""
        return self._readers.get(name, ())

    def read_once(self, name: str) -> bool:
        """Whether exactly one node reads the value and it is no output of the graph."""
        return len(self.readers(name)) == 1 and name not in self.outputs

    def rank(self, name: str) -> int | None:
        """The rank of a value, where it is known."""
        spec = self.specs.get(name)
        return None if spec is None or spec.shape is None else len(spec.shape)

    def nodes(self) -> list[NodeProto]:
        """The nodes as they stand now."""
        return [node for slot in self._slots for node in slot]

    def alive(self, node: NodeProto) -> bool:
        """Whether the node is still in the graph."""
        return any(candidate is node for candidate in self._slot_of[node.name])

    def set_input(self, node: NodeProto, index: int, name: str) -> None:
        """Make the node read another value; an index past the end appends (gaps stay empty)."""
        self._forget(node)
        while len(node.input) <= index:
            node.input.append("")
        node.input[index] = name
        self._register(node)
        self.modified = True

    def set_output(self, node: NodeProto, name: str) -> None:
        """Rename the node's first output."""
        self._forget(node)
        node.output[0] = name
        self._register(node)
        self.modified = True

    def remove(self, node: NodeProto) -> None:
        """Take the node out of the graph."""
        self.replace(node, ())

    def absorb(self, into: NodeProto, node: NodeProto) -> None:
        """Remove a node whose work another one now does; that one makes its first output."""
        output = node.output[0]
        self.remove(node)
        self.set_output(into, output)

    def replace(self, node: NodeProto, new: Sequence[NodeProto]) -> None:
        """Put new nodes in the place of one."""
        self._forget(node)
        slot = self._slot_of[node.name]
        place = next(index for index, candidate in enumerate(slot) if candidate is node)
        slot[place : place + 1] = new
        self._adopt(slot, new)

    def insert_after(self, node: NodeProto, new: NodeProto) -> None:
        """Put a new node right behind one that stays."""
        slot = self._slot_of[node.name]
        place = next(index for index, candidate in enumerate(slot) if candidate is node)
        slot.insert(place + 1, new)
        self._adopt(slot, (new,))

    def _adopt(self, slot: list[NodeProto], new: Sequence[NodeProto]) -> None:
        for node in new:
            self._slot_of[node.name] = slot
            self._register(node)
        self.modified = True

    def flush(self) -> None:
        """Write the nodes back to the graph."""
        if self.modified:
            nodes = self.nodes()
            del self.graph.node[:]
            self.graph.node.extend(nodes)
