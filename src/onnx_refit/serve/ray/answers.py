"""What a replica answers a request with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx_refit.tensors import Array


@dataclass(frozen=True)
class Answered:
    """The outputs of one inference.

    Attributes:
        outputs: output name -> array.
        version: the version that answered.
        epoch: when that was published.
        replica: who answered.
    """

    outputs: Mapping[str, Array]
    version: int
    epoch: int
    replica: str
