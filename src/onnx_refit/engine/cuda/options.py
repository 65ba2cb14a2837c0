"""What a user may choose about the CUDA engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Precision(Enum):
    """How float32 weights and activations are computed."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"


class Recurrent(Enum):
    """How LSTM and GRU layers run: what is fastest here, the library (cuDNN), or a plain loop."""

    AUTO = "auto"
    LIBRARY = "library"
    LOOP = "loop"


@dataclass(frozen=True)
class CudaOptions:
    """Options of the CUDA engine.

    Attributes:
        devices: where to run, as PyTorch names it; several make a group that is refitted together. ``"cpu"`` works
            too, slowly: it is how the engine is tested without a GPU.
        precision: fp32 is exact; tf32 rounds the operands of products; fp16 and bf16 store and compute in half. The
            cast is part of the refit.
        recurrent: how LSTM and GRU layers run.
        graphs: record a CUDA graph for each input shape.
        graph_after: record at the how-manieth request of a shape; earlier ones run without.
        graph_memory: bytes that recorded graphs may take; the least recently used are dropped.
        buckets: dimension name -> sizes to round up to, for dimensions along which rows do not influence each other
            (a batch). Whether they do is tried at the first use of each size, and padding is left off where they do.
        inductor: also try TorchInductor, which compiles for seconds to minutes at the second request of each new
            shape, and other requests wait meanwhile: for models with few shapes.
        measure: time the ways to run a network once, where there are several, and keep the choice in the plan.
        typical: dimension name -> size to measure at; dimensions not named here are measured at 32.
        chunk: bytes of each of the two pinned buffers through which host weights go to the device.
    """

    devices: tuple[str, ...] = ("cuda:0",)
    precision: Precision = Precision.FP32
    recurrent: Recurrent = Recurrent.AUTO
    graphs: bool = True
    graph_after: int = 2
    graph_memory: int = 2 << 30
    buckets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inductor: bool = False
    measure: bool = True
    typical: Mapping[str, int] = field(default_factory=dict)
    chunk: int = 32 << 20
