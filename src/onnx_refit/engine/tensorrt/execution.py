"""One execution context with its stream and its input and output memory. **Not run** on a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_refit.engine.tensorrt.bindings import Bindings, last_errors
from onnx_refit.engine.tensorrt.device import Device, DeviceBuffer
from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype


class Execution:
    """Runs one inference at a time. Its memory grows to the largest shapes seen and is kept."""

    def __init__(
        self,
        bindings: Bindings,
        device: Device,
        engine: Any,
        logger: Any,
        outputs: Sequence[TensorSpec],
        config: Any = None,
    ) -> None:
        self._trt = bindings.module
        self._device = device
        self._logger = logger
        self._outputs = outputs
        self._context = engine.create_execution_context() if config is None else engine.create_execution_context(config)
        if self._context is None:
            raise EngineError(f"TensorRT made no execution context: {last_errors(logger)}")
        self._on_host = {
            name
            for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
            if engine.get_tensor_location(name) == self._trt.TensorLocation.HOST
        }
        self._stream = device.create_stream()
        self._buffers: dict[str, DeviceBuffer] = {}
        self._allocators: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one inference; every output by name; EngineError with TensorRT's words where it fails."""
        held = [self._set_input(name, np.asarray(array, order="C")) for name, array in inputs.items()]
        missing = self._context.infer_shapes()
        if missing:
            raise EngineError(f"the inputs leave shapes open: {', '.join(missing)}")
        for spec in self._outputs:
            self._set_output(spec)
        if not self._context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT failed: {last_errors(self._logger)}")
        self._device.synchronize(self._stream)  # shapes that depend on values are known only now
        results = {spec.name: self._read(spec) for spec in self._outputs}
        self._device.synchronize(self._stream)
        del held
        return results

    def close(self) -> None:
        """Give the stream and the memory back."""
        self._context = None
        for buffer in self._buffers.values():
            buffer.release()
        for allocator in self._allocators.values():
            allocator.buffer.release()
        self._device.destroy_stream(self._stream)

    def _set_input(self, name: str, array: Array) -> Array:
        if not self._context.set_input_shape(name, tuple(array.shape)):
            raise EngineError(
                f"the shape {list(array.shape)} is outside of the profile ({last_errors(self._logger)})", where=name
            )
        if name in self._on_host:
            self._context.set_tensor_address(name, array.ctypes.data)
        else:
            address = self._buffer(name, array.nbytes)
            self._device.copy_in(address, array, self._stream)
            self._context.set_tensor_address(name, address)
        return array

    def _set_output(self, spec: TensorSpec) -> None:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if any(size < 0 for size in shape):
            allocator = self._allocators.get(spec.name)
            if allocator is None:
                allocator = self._allocators[spec.name] = make_output_allocator(self._trt, self._device)
            self._context.set_output_allocator(spec.name, allocator)
            self._context.set_tensor_address(spec.name, 0)
            return
        itemsize = numpy_dtype(spec.dtype).itemsize
        self._context.set_tensor_address(spec.name, self._buffer(spec.name, math.prod(shape) * itemsize))

    def _read(self, spec: TensorSpec) -> Array:
        allocator = self._allocators.get(spec.name)
        if allocator is None:
            shape, address = tuple(self._context.get_tensor_shape(spec.name)), self._buffers[spec.name].address
        else:
            shape, address = allocator.shape, allocator.buffer.address
        array: Array = np.empty(shape, numpy_dtype(spec.dtype))
        self._device.copy_out(array, address, self._stream)
        return array

    def _buffer(self, name: str, nbytes: int) -> int:
        held = self._buffers.get(name)
        if held is None:
            held = self._buffers[name] = DeviceBuffer(self._device, nbytes)
        return held.reserve(max(1, nbytes))


def make_output_allocator(trt: Any, device: Device) -> Any:
    """An ``IOutputAllocator`` of these bindings over one growing buffer; attributes ``buffer`` and ``shape``."""

    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[misc]
        """Memory for one output whose shape TensorRT knows only when it has run."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffer = DeviceBuffer(device)
            self.shape: tuple[int, ...] = ()

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            """The address of memory for so many bytes."""
            return self.buffer.reserve(max(1, size))

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            """The same; the stream has nothing enqueued that reads the old memory."""
            return self.buffer.reserve(max(1, size))

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            """Take the shape that the output has this time."""
            self.shape = tuple(shape)

    return OutputAllocator()
