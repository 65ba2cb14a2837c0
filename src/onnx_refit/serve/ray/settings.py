"""What an operator chooses about a deployment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from onnx_refit.engine.registry import EngineOptions
from onnx_refit.serve.cluster.roster import Patience

NAMESPACE = "onnx-refit"
"""The Ray namespace of all coordinators."""
DEPLOYMENT = "EngineReplica"
"""The name of the deployment inside its Serve application."""


def coordinator_name(name: str) -> str:
    """The name of the coordinator's actor."""
    return f"coordinator of {name}"


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of one deployment. They travel to every replica.

    Attributes:
        name: the deployment's name, that of the Serve application.
        keep: versions that a replica holds, at least 2.
        instances: inferences that run at a time in a replica.
        engine: options of the engine.
        patience: how long the coordinator waits for replicas.
        on_phase: told of every phase, in the process that is in it: see ``Replica`` and ``Coordinator``. Must be a
            function of a module that every machine has.
    """

    name: str
    keep: int = 2
    instances: int = 1
    engine: EngineOptions = field(default_factory=EngineOptions)
    patience: Patience = field(default_factory=Patience)
    on_phase: Callable[[str, str], None] | None = None
