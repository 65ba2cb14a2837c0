"""What a user may choose about the ONNX Runtime engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Options of the ONNX Runtime engine.

    Attributes:
        threads: intra-op threads of an inference and threads that derive weights; 0 lets ONNX Runtime choose
            (one a physical core).
        optimise: specialise the activation graph for this host (ONNX Runtime's own offline optimisation, blocked
            matrix products). Without it the graph runs as it was compiled: slower, but ready at once.
        in_place: write packed weights of recurrences into the memory of a session where that is possible, instead of
            building a prepacked session for each weight set in the background.
    """

    threads: int = 0
    optimise: bool = True
    in_place: bool = True
