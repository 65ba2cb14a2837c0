"""PyTorch, found when it is needed; and the process-wide switches this engine must hold while it computes."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnx_refit.engine.cuda.options import Precision
from onnx_refit.errors import EngineError, MissingExtraError


def require_torch(device: str) -> Any:
    """The module torch, if it can use this device.

    Raises:
        MissingExtraError: PyTorch is not installed.
        EngineError: it is, but there is no such device; the message says what is missing.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise MissingExtraError("torch", "cuda", "the engine 'cuda'") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "this PyTorch is built without CUDA" if built is None else "PyTorch sees no NVIDIA GPU or driver"
        raise EngineError(
            f"the engine 'cuda' needs an NVIDIA GPU, and {reason} (torch {torch.__version__})",
            hint="Use engine='onnxruntime' here, or CudaOptions(devices=('cpu',)) to try the code path",
        )
    if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= torch.cuda.device_count():
        raise EngineError(f"there is no device {device}", hint=f"PyTorch sees {torch.cuda.device_count()}")
    return torch


_SWITCHES = threading.RLock()


@contextmanager
def exact_products(torch: Any, precision: Precision, *, tune: bool = False) -> Iterator[None]:
    """Allow TF32 in products only if it was chosen; the switches are the process's, so they are put back.

    Args:
        torch: the module.
        precision: the engine's precision.
        tune: let cuDNN time its convolutions and take the fastest, which a recording then keeps.
    """
    wanted = precision is Precision.TF32
    with _SWITCHES:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = wanted, wanted, tune
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def real_dtype(torch: Any, precision: Precision) -> Any:
    """The dtype that stands for float32 at this precision."""
    return {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}.get(precision, torch.float32)
