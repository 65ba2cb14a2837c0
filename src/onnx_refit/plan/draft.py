"""The working state of one compilation: a model without tensors, and the tensors next to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.errors import ModelError
from onnx_refit.model.graph import Names, all_graphs, opset
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.plan.program import ProgramBuilder


@dataclass
class Draft:
    """What the passes of the compiler change in place.

    Every value name is unique over the main graph and all sub-graphs, so one name means one value everywhere.

    Attributes:
        model: nodes, inputs and outputs; no initializer and no Constant node. Weights and constants are read by name.
        program: the refit program so far: the source weights, the constants, and what was computed from them.
        names: gives names that clash with none in use.
        decisions: what was decided so far, with reasons.
        aliases: value that the model names -> the value of the program that it is, under another name.
        derived: weight that is computed here although the model stores it -> the two values it is the product of.
    """

    model: ModelProto
    program: ProgramBuilder
    names: Names
    decisions: list[Decision] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    derived: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return opset(self.model) or 1

    def graphs(self) -> Iterator[GraphProto]:
        """The main graph and all nested ones, outer first."""
        return all_graphs(self.model.graph)

    def nodes(self) -> Iterator[NodeProto]:
        """Every node of every graph."""
        for graph in self.graphs():
            yield from graph.node

    def accept(self, subject: str, action: str, reason: str) -> None:
        """Record a rewrite that was made."""
        self.decisions.append(Decision(subject, action, Verdict.ACCEPTED, reason))

    def reject(self, subject: str, action: str, reason: str) -> None:
        """Record a rewrite that was left out."""
        self.decisions.append(Decision(subject, action, Verdict.REJECTED, reason))


class DraftPass(Protocol):
    """One pass of the compiler. Unlike a model pass it changes the draft in place: weights are never copied."""

    @property
    def name(self) -> str:
        """The pass's name, in the imperative."""
        ...

    def requires(self, draft: Draft) -> str | None:
        """None if the pass can run, else what is missing, a clause without a final stop."""
        ...

    def call(self, draft: Draft) -> int:
        """Run the pass; how many rewrites it made (0: the draft is as it was). Each is recorded as a decision."""
        ...

    def ensures(self, draft: Draft) -> str | None:
        """None if the draft is as the pass promises, else what is not, a clause without a final stop."""
        ...


def run_draft_passes(draft: Draft, passes: Sequence[DraftPass]) -> int:
    """Run passes one after another; how many rewrites they made. ModelError where a contract does not hold."""
    total = 0
    for step in passes:
        missing = step.requires(draft)
        if missing is not None:
            raise ModelError(f"the compiler pass cannot run: {missing}", where=step.name)
        total += step.call(draft)
        broken = step.ensures(draft)
        if broken is not None:
            raise ModelError(f"the compiler pass did not keep its promise: {broken}", where=step.name)
    return total
