"""The contract of a fold, and the loop that applies folds to every graph of a draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from onnx import GraphProto, NodeProto

from onnx_refit.errors import ModelError
from onnx_refit.model.graph import subgraphs
from onnx_refit.plan.draft import Draft
from onnx_refit.plan.folds.site import Site, operator
from onnx_refit.plan.shapes import draft_specs
from onnx_refit.tensors import TensorSpec

ABSENT = ""
"""What ``Fold.requires`` says where its pattern is not there at all: nothing to decide, nothing to record."""


class Fold(Protocol):
    """One rewrite around an anchor node."""

    @property
    def action(self) -> str:
        """What it does, in the imperative ("fold BatchNormalization into the operator before it")."""
        ...

    @property
    def anchors(self) -> frozenset[str]:
        """The operators it is tried at, as ``operator`` names them."""
        ...

    def requires(self, site: Site, node: NodeProto) -> str | None:
        """None if the fold can be made at this node; ``ABSENT``; or why it is left out, a clause."""
        ...

    def call(self, site: Site, node: NodeProto) -> str:
        """Make the fold; what became of the node, a clause for the decision."""
        ...

    def ensures(self, site: Site, node: NodeProto) -> str | None:
        """None if all is as promised, else what is not, a clause."""
        ...


class FoldPass:
    """A compiler pass that applies folds, in the order given, to every node of every graph, inner graphs first.

    Nodes are visited in topological order, once each: a fold at a node sees what earlier folds made of the nodes
    before it, so chains fold from the front.
    """

    name = "fold"

    def __init__(self, folds: Sequence[Fold]) -> None:
        self._folds = folds

    def requires(self, draft: Draft) -> str | None:
        """Unique node names, which the site looks nodes up by."""
        names = [node.name for node in draft.nodes()]
        return None if len(names) == len(set(names)) else "two nodes have one name"

    def call(self, draft: Draft) -> int:
        """Fold; how many folds were made."""
        return self._graph(draft, draft.graph, draft_specs(draft))

    def ensures(self, draft: Draft) -> str | None:
        """No fold is left to be made."""
        for graph in draft.graphs():
            site = Site(draft, graph, {})
            for node in site.nodes():
                for fold in self._folds:
                    if operator(node) in fold.anchors and fold.requires(site, node) is None:
                        return f"{fold.action} is still possible at {node.name!r}"
        return None

    def _graph(self, draft: Draft, graph: GraphProto, specs: Mapping[str, TensorSpec]) -> int:
        count = 0
        for node in graph.node:
            for inner in subgraphs(node):
                count += self._graph(draft, inner, specs)
        site = Site(draft, graph, specs)
        for node in site.nodes():
            for fold in self._folds:
                if operator(node) not in fold.anchors or not site.alive(node):
                    continue
                count += self._try(site, fold, node)
        site.flush()
        return count

    @staticmethod
    def _try(site: Site, fold: Fold, node: NodeProto) -> int:
        name = node.name
        obstacle = fold.requires(site, node)
        if obstacle == ABSENT:
            return 0
        if obstacle is not None:
            site.draft.reject(name, fold.action, obstacle)
            return 0
        outcome = fold.call(site, node)
        broken = fold.ensures(site, node)
        if broken is not None:
            raise ModelError(f"{fold.action} did not keep its promise: {broken}", where=name)
        site.draft.accept(name, fold.action, outcome)
        return 1
