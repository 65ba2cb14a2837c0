"""Which engines there are, and how to make a backend of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from onnx_refit.engine.cuda.options import CudaOptions
from onnx_refit.engine.protocol import Backend
from onnx_refit.engine.tensorrt.options import TensorRtOptions
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import Array

DEFAULT_ENGINE = "onnxruntime"


@dataclass(frozen=True)
class EngineOptions:
    """What a caller may choose about any engine.

    Attributes:
        threads: threads one inference and one refit may use; 0 means one a physical core.
        cold: where source weights go, once refits pause, that only a later partial refit, diff or adapter wants
            (those that the engine folded into others): ``"disk"``, an unlinked temporary file under ``TMPDIR``, or
            ``"memory"``. Where there is no disk they stay in memory, and ``Engine.decisions`` says why.
        cuda: what only the engine ``"cuda"`` has; None takes its defaults.
        tensorrt: what only the engine ``"tensorrt"`` has; None takes its defaults.
    """

    threads: int = 0
    cold: Literal["disk", "memory"] = "disk"
    cuda: CudaOptions | None = None
    tensorrt: TensorRtOptions | None = None


def _onnxruntime(
    compiled: CompiledModel, weights: Mapping[str, Array] | None, options: EngineOptions, artefact: bytes | None
) -> tuple[Backend, bytes | None]:
    from onnx_refit.engine.onnxruntime.backend import create
    from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions

    backend = create(compiled, weights, OnnxRuntimeOptions(threads=options.threads), artefact)
    return backend, backend.artefact() if artefact is None else None


def _cuda(
    compiled: CompiledModel, weights: Mapping[str, Array] | None, options: EngineOptions, artefact: bytes | None
) -> tuple[Backend, bytes | None]:
    from onnx_refit.engine.cuda.create import create

    return create(compiled, weights, options.cuda or CudaOptions(), artefact)


def _tensorrt(
    compiled: CompiledModel, weights: Mapping[str, Array] | None, options: EngineOptions, artefact: bytes | None
) -> tuple[Backend, bytes | None]:
    from onnx_refit.engine.tensorrt.backend import create

    backend = create(compiled, weights, options.tensorrt or TensorRtOptions(), artefact)
    return backend, backend.artefact()


_Factory = Callable[
    [CompiledModel, Mapping[str, Array] | None, EngineOptions, bytes | None], tuple[Backend, bytes | None]
]
_FACTORIES: dict[str, _Factory] = {"onnxruntime": _onnxruntime, "cuda": _cuda, "tensorrt": _tensorrt}


def engine_names() -> tuple[str, ...]:
    """The names ``build(engine=…)`` takes."""
    return tuple(_FACTORIES)


def require_engine(name: str) -> None:
    """EngineError unless there is an engine of this name."""
    if name not in _FACTORIES:
        raise EngineError(f"there is no engine {name!r}", hint=f"The engines are {', '.join(_FACTORIES)}")


def create_backend(
    name: str,
    compiled: CompiledModel,
    *,
    weights: Mapping[str, Array] | None = None,
    options: EngineOptions = EngineOptions(),
    artefact: bytes | None = None,
) -> tuple[Backend, bytes | None]:
    """Make a backend for a compiled model on this host.

    Args:
        name: the engine.
        compiled: the portable engine.
        weights: source weights, where at hand; engines may time their choices on them.
        options: what the caller chose.
        artefact: a cached host specialisation; used only if it was made for this very host and model.

    Returns:
        The backend, and the host specialisation to cache (None where the engine has none, or one was given).

    Raises:
        EngineError: no such engine, or it cannot run the model.
        MissingExtraError: the engine's package is not installed.
    """
    require_engine(name)
    return _FACTORIES[name](compiled, weights, options, artefact)


def specialised(
    name: str, compiled: CompiledModel, *, weights: Mapping[str, Array] | None = None, options: EngineOptions
) -> bytes | None:
    """The host specialisation that ``create_backend`` would give, None where the engine has none; raises as it does."""
    require_engine(name)
    if name == DEFAULT_ENGINE:
        # It needs no engine for that, and making one takes as long as a tenth of a small model's build.
        from onnx_refit.engine.onnxruntime.artefact import make
        from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions

        return make(compiled, OnnxRuntimeOptions(threads=options.threads))
    backend, artefact = create_backend(name, compiled, weights=weights, options=options)
    backend.close()
    return artefact
