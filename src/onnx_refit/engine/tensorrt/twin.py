"""One TensorRT engine on the device, refitted as a whole or thrown away. **Not run** on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_refit.engine.tensorrt.bindings import Bindings, last_errors
from onnx_refit.engine.tensorrt.device import Device
from onnx_refit.engine.tensorrt.execution import Execution
from onnx_refit.engine.tensorrt.runtime_cache import RuntimeCache
from onnx_refit.engine.tensorrt.weightset import TensorRtWeightSet
from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array, TensorSpec


class Twin:
    """A device engine made from a plan. Refits need it alone; inferences may run side by side.

    ``IRefitter``'s contract says that a refit which returns false may have changed some weights already. So a twin
    whose refit did not succeed from beginning to end is closed, and made anew from the plan before it is used again.
    """

    def __init__(
        self,
        bindings: Bindings,
        device: Device,
        plan: bytes,
        weights: Mapping[str, TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        host_code: bool,
        runtime_cache: Path | None = None,
    ) -> None:
        self._bindings = bindings
        self._trt = bindings.module
        self._device = device
        self._plan = plan
        self._specs = weights
        self._outputs = outputs
        self._host_code = host_code
        self._cache_path = runtime_cache
        self._cache: RuntimeCache | None = None
        self._logger = bindings.logger()
        self._engine: Any = None
        self._runtime: Any = None
        self._refitter: Any = None
        self._stream: int | None = None
        self._idle: list[Execution] = []

    @property
    def is_open(self) -> bool:
        """Whether there is an engine on the device."""
        return self._engine is not None

    def open(self) -> None:
        """Make the engine from the plan and check that every weight can be refitted; EngineError if not."""
        self._runtime = self._trt.Runtime(self._logger)
        if self._host_code:
            self._runtime.engine_host_code_allowed = True  # a version-compatible plan brings its runtime along
        self._engine = self._runtime.deserialize_cuda_engine(self._plan)
        if self._engine is None:
            self._runtime = None
            raise EngineError(f"TensorRT cannot load the plan here: {last_errors(self._logger)}")
        try:
            self._refitter = self._trt.Refitter(self._engine, self._logger)
            self._check_complete()
            self._stream = self._device.create_stream()
            self._cache = RuntimeCache(self._bindings, self._engine, self._cache_path)
        except BaseException:
            self.close()
            raise

    def _check_complete(self) -> None:
        """EngineError unless the engine can take every engine weight, in the dtype and size that will be given.

        ``get_missing_weights`` is not enough: on TensorRT-RTX it leaves weights out.
        """
        known = set(self._refitter.get_all_weights())
        lost = [name for name in self._specs if name not in known]
        if lost:
            raise EngineError(
                f"TensorRT's engine cannot be refitted with {len(lost)} of {len(self._specs)} weights: "
                f"{', '.join(lost[:5])}",
                hint="Name them in BuildOptions(constant=...) to bake them in",
            )
        for name, spec in self._specs.items():
            prototype = self._refitter.get_weights_prototype(name)
            wanted = self._bindings.data_type(spec.dtype, name)
            if prototype.size != spec.size or prototype.dtype != wanted:
                raise EngineError(
                    f"TensorRT expects {prototype.size} elements of {prototype.dtype}, the plan has {spec}", where=name
                )

    def refit(self, weights: TensorRtWeightSet) -> None:
        """Put a whole weight set into the engine; nothing else may use the twin meanwhile.

        Every weight is given every time: an engine may have combined weights, and what TensorRT reports as missing
        is not complete.

        Raises:
            EngineError: it failed; the twin is closed, and ``open`` makes it anew without weights.
        """
        if not self.is_open:
            self.open()
        try:
            self._set_all(weights)
            missing = [name for name in self._refitter.get_missing_weights() if name]
            if missing:
                raise EngineError(f"TensorRT misses weights that the plan does not have: {', '.join(missing[:5])}")
            if not self._refitter.refit_cuda_engine_async(self._stream):
                raise EngineError(
                    f"TensorRT's refit failed: {last_errors(self._logger)}",
                    hint="Some weights may have changed, so this engine is made anew; the other one was not touched",
                )
            self._device.synchronize(self._stream or 0)
            for name in weights.weights:
                self._refitter.unset_named_weights(name)
        except BaseException:
            self.close()
            raise
        self._logger.errors.clear()

    def _set_all(self, weights: TensorRtWeightSet) -> None:
        location = self._trt.TensorLocation
        for name, stored in weights.weights.items():
            dtype = self._bindings.data_type(stored.spec.dtype, name)
            value = self._trt.Weights(dtype, stored.address, stored.spec.size)
            where = location.DEVICE if stored.on_device else location.HOST
            if not self._refitter.set_named_weights(name, value, where):
                raise EngineError(f"TensorRT refused the weight: {last_errors(self._logger)}", where=name)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one inference with the weights it holds; any number of threads may, but none during a refit."""
        try:
            execution = self._idle.pop()
        except IndexError:
            config = None if self._cache is None else self._cache.config
            execution = Execution(self._bindings, self._device, self._engine, self._logger, self._outputs, config)
        try:
            results = execution.run(inputs)
        except BaseException:
            execution.close()  # what it holds after a failure is unknown
            raise
        self._idle.append(execution)
        return results

    def close(self) -> None:
        """Free the engine. Objects go in the order that TensorRT wants: what was made from an object before it."""
        for execution in self._idle:
            execution.close()
        self._idle.clear()
        if self._cache is not None:
            self._cache.save()
            self._cache = None
        self._refitter = None
        self._engine = None
        self._runtime = None
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._device.destroy_stream(stream)
