"""The contract of a model pass: what it needs, what it changed and why.

A pass takes a model and returns a new one with the list of its changes; it never changes its argument. Passes are
composed by ``run_passes``, which checks each pass's requirements before and its promises after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onnx import ModelProto

from onnx_refit.errors import ModelError
from onnx_refit.model.vocabulary import VocabularyMap


@dataclass(frozen=True)
class Change:
    """One change a pass made.

    Attributes:
        node: the node (or value) it was made at.
        op_type: the operator of that node.
        what: what was done, in words ("replaced by ArgMax -> Gather").
        why: why it had to be done.
    """

    node: str
    op_type: str
    what: str
    why: str


@dataclass(frozen=True)
class Blocker:
    """Something a pass met and could not rewrite.

    Attributes:
        node: the node.
        op_type: its operator.
        reason: why it stays.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        model: the new model (the same object where nothing changed).
        changes: what was changed; empty means the pass found nothing to do.
        blockers: what it met and left as it was, with the reason.
        preprocessors: what left the graph at its inputs, in the order in which the host applies it.
        postprocessors: what left the graph at its outputs, in the order in which the host applies it.
    """

    model: ModelProto
    changes: tuple[Change, ...] = field(default=())
    blockers: tuple[Blocker, ...] = field(default=())
    preprocessors: tuple[VocabularyMap, ...] = field(default=())
    postprocessors: tuple[VocabularyMap, ...] = field(default=())

    @property
    def modified(self) -> bool:
        """Whether the model differs from the one given."""
        return bool(self.changes)


class Pass(Protocol):
    """One rewrite of a model."""

    @property
    def name(self) -> str:
        """The pass's name, in the imperative ("extract-vocabularies")."""
        ...

    def requires(self, model: ModelProto) -> str | None:
        """None if the pass can run on this model, else what is missing, a clause without a final stop."""
        ...

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        ...

    def ensures(self, model: ModelProto) -> str | None:
        """None if the model is as the pass promises, else what is not, a clause without a final stop."""
        ...


class Rewrite:
    """What most passes have in common: they run on any model, and promise nothing but what their result lists."""

    def requires(self, model: ModelProto) -> str | None:
        """Nothing."""
        return None

    def ensures(self, model: ModelProto) -> str | None:
        """Nothing: what stays is listed with its reason."""
        return None


def run_passes(model: ModelProto, passes: Sequence[Pass]) -> tuple[ModelProto, tuple[tuple[Pass, PassResult], ...]]:
    """Run passes one after another; ModelError where a requirement or a promise does not hold."""
    results: list[tuple[Pass, PassResult]] = []
    for step in passes:
        missing = step.requires(model)
        if missing is not None:
            raise ModelError(f"the pass cannot run: {missing}", where=step.name)
        result = step.call(model)
        broken = step.ensures(result.model)
        if broken is not None:
            raise ModelError(f"the pass did not keep its promise: {broken}", where=step.name)
        model = result.model
        results.append((step, result))
    return model, tuple(results)
