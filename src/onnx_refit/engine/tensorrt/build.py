"""Building TensorRT's own plan: flags, profile, workspace, timing cache.

Ahead-of-time builds **without** refittable weights were run (TensorRT-RTX, no GPU). Builds with them need a GPU and
were **not run**.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx_refit.engine.tensorrt.bindings import Bindings, last_errors
from onnx_refit.engine.tensorrt.network import Network, mark_refittable
from onnx_refit.engine.tensorrt.options import HardwareCompatibility, TensorRtOptions
from onnx_refit.engine.tensorrt.profiles import Profile
from onnx_refit.errors import EngineError
from onnx_refit.files import write_bytes


def build_plan(
    bindings: Bindings,
    logger: Any,
    parsed: Network,
    profile: Profile,
    options: TensorRtOptions,
    *,
    refit: bool = True,
    target: str | None = None,
) -> bytes:
    """Build a network.

    Args:
        bindings: TensorRT.
        logger: a logger of these bindings.
        parsed: the network.
        profile: shapes of its dynamic inputs.
        options: what the user chose.
        refit: mark the weights refittable. Needs a GPU; without, TensorRT-RTX builds on any machine.
        target: TensorRT-RTX only: the ``ComputeCapability`` to build for (``"SM120"``); None lets it choose.

    Returns:
        TensorRT's serialised plan.

    Raises:
        EngineError: the build failed, with TensorRT's own words.
    """
    trt = bindings.module
    config = parsed.builder.create_builder_config()
    if refit:
        mark_refittable(logger, parsed.network, parsed.weights)
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        if options.strip:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware is not HardwareCompatibility.NONE:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, options.hardware.value)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if target is not None:
        _set_target(bindings, config, target)
    _add_profile(parsed, config, profile)
    # TensorRT-RTX compiles its kernels where it runs and keeps no timings (deprecated there since 1.2).
    cache = None if bindings.is_rtx else _timing_cache(config, options.timing_cache)
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise EngineError(f"TensorRT could not build the network: {last_errors(logger)}")
    logger.errors.clear()
    if cache is not None and options.timing_cache is not None:
        _write_timing_cache(config, options.timing_cache)
    return bytes(plan)


def _set_target(bindings: Bindings, config: Any, target: str) -> None:
    if not bindings.has("ComputeCapability", target):
        raise EngineError(f"{bindings.label} cannot build for {target}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(bindings.module.ComputeCapability, target), 0)


def _add_profile(parsed: Network, config: Any, profile: Profile) -> None:
    if not profile.shapes:
        return
    made = parsed.builder.create_optimization_profile()
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        if tensor.is_shape_tensor:
            raise EngineError(
                "the values of this input decide shapes, and profiles of values are not supported", where=tensor.name
            )
    for name, shapes in profile.shapes.items():
        made.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(made) < 0:
        raise EngineError(f"TensorRT refused the profile {dict(profile.shapes)}")


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    held = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, False):
        # A cache of another GPU or version: start anew instead of trusting it.
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            return None
    return cache


def _write_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    data = None if cache is None else cache.serialize()
    if data is not None:
        write_bytes(path, bytes(data))
