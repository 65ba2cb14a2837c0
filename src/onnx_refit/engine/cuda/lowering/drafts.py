"""A graph's nodes before they are lowered: plain records that passes can replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import GraphProto

from onnx_refit.engine.cuda.lowering.operators import attributes_of


@dataclass(frozen=True)
class Draft:
    """One node.

    Attributes:
        op_type: the operator; those of our own begin with an underscore.
        name: the node's name or that of its first output.
        inputs: names of its operands, empty for absent ones.
        outputs: names of its results.
        attributes: see ``Node.attributes``.
    """

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


def drafts_of(graph: GraphProto) -> list[Draft]:
    """The nodes of a graph, in its order."""
    return [
        Draft(node.op_type, node.name or node.output[0], tuple(node.input), tuple(node.output), attributes_of(node))
        for node in graph.node
    ]


class Flow:
    """Who makes and who reads what.

    Args:
        drafts: the nodes in order.
        outputs: the graph's outputs, which count as read.
    """

    def __init__(self, drafts: Sequence[Draft], outputs: Iterable[str]) -> None:
        self.makers = {name: draft for draft in drafts for name in draft.outputs if name}
        self.uses = Counter(name for draft in drafts for name in draft.inputs if name)
        self.uses.update(outputs)
        self._readers: dict[str, Draft] = {name: draft for draft in drafts for name in draft.inputs if name}
        self._outputs = frozenset(outputs)

    def only_reader(self, name: str) -> Draft | None:
        """The node that alone reads a value, once; None if there are more, or it is an output of the graph."""
        return self._readers.get(name) if self.uses[name] == 1 and name not in self._outputs else None
