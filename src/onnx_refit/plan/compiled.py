"""The portable result of compilation: an activation graph, a refit program, and why each is as it is.

Nothing here depends on a host or a backend. A backend specialises a ``CompiledModel`` for the machine it runs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import onnx

from onnx_refit.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """One refittable weight, as the user's model names it.

    Attributes:
        spec: name, dtype and static shape.
        uses: what reads it in the user's model, one ``"node_name (OpType)[input_index]"`` a use.
        origin: the kind of thing it was in the user's model: ``"initializer"``, ``"constant"``,
            ``"constant-of-shape"``, ``"sparse-initializer"``.
    """

    spec: TensorSpec
    uses: tuple[str, ...]
    origin: str = "initializer"


class Verdict(Enum):
    """What the compiler decided about a possible rewrite."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of the compiler: a fold, a hoist, an optimisation, accepted or rejected, and why.

    Attributes:
        subject: what it is about (a node, a tensor, an optimiser of the engine).
        action: what was or would have been done ("fold BatchNormalization into Conv").
        verdict: accepted or rejected.
        reason: why, a clause without a final stop.
    """

    subject: str
    action: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class RefitProgram:
    """How engine weights are computed from source weights: an ONNX graph, plus the weights that need no work.

    Attributes:
        model: graph inputs are source weights, graph outputs are engine weights; None where nothing is computed.
            It holds weight-only nodes: any ONNX operator, with constants as initializers.
        passthrough: engine weight name -> source weight name, where both are the same bytes.
        dependencies: engine weight name -> names of the source weights it is computed from.
    """

    model: onnx.ModelProto | None
    passthrough: Mapping[str, str]
    dependencies: Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class CompiledModel:
    """The portable engine: what a plan holds besides weights.

    Attributes:
        activation: the graph that runs at inference. Its graph inputs are the model's inputs followed by one input an
            engine weight (of the main graph; sub-graphs read them from the outer scope); it has no other refittable
            weight. Constants that are not refittable stay initializers.
        program: source weights -> engine weights.
        sources: every refittable weight.
        engine_weights: every engine weight, static shapes; the same names as the extra inputs of ``activation``.
        inputs: the model's own inputs.
        outputs: the model's outputs.
        decisions: what was folded, hoisted or left alone, with reasons.
        derived: tensor of the user's model that is no source weight, as it is the product of two others (the scale of
            a quantised bias) -> those two, source weights or constants of ``activation``.
    """

    activation: onnx.ModelProto
    program: RefitProgram
    sources: tuple[SourceWeight, ...]
    engine_weights: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    decisions: tuple[Decision, ...] = field(default=())
    derived: Mapping[str, tuple[str, str]] = field(default_factory=dict)
