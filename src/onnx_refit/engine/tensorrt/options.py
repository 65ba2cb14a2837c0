"""What a user may choose about the TensorRT engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from onnx_refit.engine.tensorrt.profiles import Range, ShapeRange

_FALLBACK = Range(1, 64, 512)


class HardwareCompatibility(Enum):
    """Which GPUs beside the one at hand a plan shall run on (``HardwareCompatibilityLevel``)."""

    NONE = "NONE"
    SAME_COMPUTE_CAPABILITY = "SAME_COMPUTE_CAPABILITY"
    AMPERE_PLUS = "AMPERE_PLUS"


@dataclass(frozen=True)
class TensorRtOptions:
    """Options of the TensorRT engine.

    Attributes:
        package: the module to use (``"tensorrt"``, ``"tensorrt_rtx"``, ``"tensorrt_rtx_bindings"``); None takes the
            first of these that can be imported.
        shapes: input name -> smallest, usual and largest shape, for dynamic inputs.
        dimensions: dimension name -> smallest, usual and largest size, for inputs not in ``shapes``.
        fallback: smallest, usual and largest size of a dynamic dimension that nothing else says.
        workspace: bytes of GPU memory that the builder may use for a layer; None leaves TensorRT's default.
        timing_cache: file to read kernel timings from and to write them back to; None keeps none. TensorRT-RTX
            has none: it compiles its kernels where it runs.
        runtime_cache: TensorRT-RTX only: file to keep the kernels in that it compiles where it runs.
        strip: leave the refittable weights out of the plan (they come by the first refit in any case).
        tf32: let float32 products round their inputs to TF32.
        version_compatible: ask for a plan that later versions of the same package can run too.
        hardware: ask for a plan that runs on other GPUs too.
        twins: engines on the device, made from the same plan: one answers while another is refitted. More keep more
            versions ready; 1 halves the memory, and requests then wait while a refit runs.
    """

    package: str | None = None
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    dimensions: Mapping[str, Range] = field(default_factory=dict)
    fallback: Range = _FALLBACK
    workspace: int | None = None
    timing_cache: Path | None = None
    runtime_cache: Path | None = None
    strip: bool = True
    tf32: bool = False
    version_compatible: bool = False
    hardware: HardwareCompatibility = HardwareCompatibility.NONE
    twins: int = 2
