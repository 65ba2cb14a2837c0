"""Passes that go from node to node of one operator, in the main graph and all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.model.edit import copy_model, is_onnx
from onnx_refit.model.graph import all_graphs, opset
from onnx_refit.model.passes import Blocker, Change, PassResult, Rewrite
from onnx_refit.model.shapes import Shapes


class Facts:
    """What is known of the model as it was before the pass."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self.opset = opset(model) or 1

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes and types of its values; inferred when first asked for."""
        return Shapes(self._model)


@dataclass(frozen=True)
class Site:
    """Where a pass is.

    Attributes:
        model: the copy that is being rewritten.
        graph: the graph of it that holds the node.
        node: the node.
        facts: of the model before the pass.
    """

    model: ModelProto
    graph: GraphProto
    node: NodeProto
    facts: Facts


class NodeRewrite(Rewrite):
    """A pass that looks at every node of one operator of ONNX's own domain.

    Attributes:
        operator: which one.
    """

    operator: ClassVar[str]

    def rewrite(self, site: Site) -> Sequence[Change | Blocker]:
        """Rewrite the node in its graph, or not; what was changed, and what was not and why."""
        raise NotImplementedError

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        if not any(is_onnx(node, self.operator) for graph in all_graphs(model.graph) for node in graph.node):
            return PassResult(model)
        copy, facts = copy_model(model), Facts(model)
        done: list[Change | Blocker] = []
        for graph in all_graphs(copy.graph):
            for node in list(graph.node):
                if is_onnx(node, self.operator):
                    done.extend(self.rewrite(Site(copy, graph, node, facts)))
        changes = tuple(one for one in done if isinstance(one, Change))
        blockers = tuple(one for one in done if isinstance(one, Blocker))
        return PassResult(copy if changes else model, changes, blockers)
