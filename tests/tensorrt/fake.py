"""A fake of the TensorRT bindings' contract, over host memory: enough to drive the adapter, failures included.

It keeps what the documentation of ``IRefitter`` promises and warns of: a refit copies weights at the call of
``refit_cuda_engine_async``; one that returns false may have changed a part of them (here: half); an engine that was
loaded from a stripped plan has no weights; inferences during a refit are undefined (here: an error). An "engine" runs
the ONNX model it was built from in ONNX Runtime, with the weights it holds.
"""

from __future__ import annotations

import ctypes
import enum
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnx_refit.engine.tensorrt.bindings import Bindings
from onnx_refit.engine.tensorrt.device import Device
from onnx_refit.errors import EngineError

DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL", "UINT8", "BF16", "FP8", "INT4"])
_NUMPY = {"FLOAT": np.float32, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_, "HALF": np.float16}
_BY_NUMPY = {np.dtype(value): DataType[key] for key, value in _NUMPY.items()}


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None: ...


class FakeDevice:
    """A GPU in host memory: addresses are those of NumPy arrays."""

    def __init__(self, capability: tuple[int, int] = (12, 0)) -> None:
        self.name, self.compute_capability = "fake", capability
        self.memory: dict[int, np.ndarray] = {}

    def make_current(self) -> None: ...

    def allocate(self, nbytes: int) -> int:
        array = np.zeros(nbytes, np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address: int) -> None:
        del self.memory[address]

    def create_stream(self) -> int:
        return 1

    def destroy_stream(self, stream: int) -> None: ...

    def copy_in(self, address: int, array: np.ndarray, stream: int) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def copy_out(self, array: np.ndarray, address: int, stream: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy_across(self, target: int, source: int, nbytes: int, stream: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def synchronize(self, stream: int) -> None: ...


class Control:
    """What the tests may break, and what happened.

    Attributes:
        refits_to_fail: how many of the next refits return false after having changed half of the weights.
        hidden: weights that ``get_all_weights`` does not list.
        unknown: weights that ``mark_weights_refittable`` refuses.
        refits: refits that succeeded.
        engines: engines made so far.
        builds: plans built so far.
        before_refit: called at the beginning of each refit.
    """

    def __init__(self) -> None:
        self.refits_to_fail = 0
        self.hidden: set[str] = set()
        self.unknown: set[str] = set()
        self.refits = self.engines = self.builds = 0
        self.before_refit = lambda: None


class Weights:
    def __init__(self, dtype: DataType, ptr: int, count: int) -> None:
        self.dtype, self.ptr, self.size = dtype, ptr, count


def read(weights: Weights, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(_NUMPY[weights.dtype.name])
    return np.frombuffer(ctypes.string_at(weights.ptr, weights.size * dtype.itemsize), dtype).reshape(shape).copy()


def fake_bindings(control: Control, *, version: str = "11.3.0", name: str = "tensorrt") -> Bindings:
    """Bindings whose module behaves as described above."""

    class BuilderConfig:
        def __init__(self) -> None:
            self.flags: set[str] = {"TF32"}
            self.profiles: list[dict[str, Any]] = []
            self.limits: dict[str, int] = {}
            self.cache: Any = None

        def set_flag(self, flag: str) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: str) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: str, size: int) -> None:
            self.limits[pool] = size

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile.shapes)
            return len(self.profiles) - 1

        def create_timing_cache(self, data: bytes) -> Any:
            return SimpleNamespace(data=data, serialize=lambda: b"timings")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if cache.data not in (b"", b"timings"):
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
            self.shapes[name] = (low, usual, high)

    class Network:
        def __init__(self) -> None:
            self.model = onnx.ModelProto()
            self.marked: list[str] = []

        @property
        def num_inputs(self) -> int:
            return len(self.model.graph.input)

        def get_input(self, index: int) -> Any:
            return SimpleNamespace(name=self.model.graph.input[index].name, is_shape_tensor=False)

        def mark_weights_refittable(self, weight: str) -> bool:
            if weight in control.unknown or weight not in {t.name for t in self.model.graph.initializer}:
                return False
            self.marked.append(weight)
            return True

    class Builder:
        def __init__(self, logger: Any) -> None: ...

        def create_network(self, flags: int = 0) -> Network:
            return Network()

        def create_builder_config(self) -> BuilderConfig:
            return BuilderConfig()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes:
            control.builds += 1
            model = onnx.ModelProto()
            model.CopyFrom(network.model)
            if "STRIP_PLAN" in config.flags:
                for tensor in model.graph.initializer:
                    if tensor.name in network.marked:
                        tensor.raw_data = b"\xff" * len(tensor.raw_data)  # NaN: nothing may read it
            return pickle.dumps((model.SerializeToString(), network.marked, sorted(config.flags)))

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            self.network, self.num_errors, self.num_subgraphs = network, 0, 0

        def supports_model_v2(self, model: bytes, path: str | None = None) -> bool:
            return True

        def load_model_proto(self, model: bytes) -> bool:
            self.network.model.ParseFromString(model)
            return True

        def load_initializer(self, weight: str, data: int, size: int) -> bool:
            tensor = next(t for t in self.network.model.graph.initializer if t.name == weight)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = ctypes.string_at(data, size)
            return True

        def parse_model_proto(self) -> bool:
            return True

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine = engine
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}
            self.allocators: dict[str, Any] = {}

        def set_input_shape(self, tensor: str, shape: tuple[int, ...]) -> bool:
            self.shapes[tensor] = shape
            return True

        def set_tensor_address(self, tensor: str, address: int) -> bool:
            self.addresses[tensor] = address
            return True

        def set_output_allocator(self, tensor: str, allocator: Any) -> bool:
            self.allocators[tensor] = allocator
            return True

        def infer_shapes(self) -> list[str]:
            return []

        def get_tensor_shape(self, tensor: str) -> tuple[int, ...]:
            return (-1,)  # all outputs as if their shapes depended on values

        def execute_async_v3(self, stream: int) -> bool:
            feeds = {}
            for value in self.engine.model.graph.input:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                shape = self.shapes[value.name]
                raw = ctypes.string_at(self.addresses[value.name], int(np.prod(shape)) * dtype.itemsize)
                feeds[value.name] = np.frombuffer(raw, dtype).reshape(shape)
            for value, array in zip(self.engine.model.graph.output, self.engine.infer(feeds), strict=True):
                array = np.ascontiguousarray(array)
                address = self.allocators[value.name].reallocate_output(value.name, 0, array.nbytes, 256)
                ctypes.memmove(address, array.ctypes.data, array.nbytes)
                self.allocators[value.name].notify_shape(value.name, array.shape)
            return True

    class Engine:
        def __init__(self, plan: bytes) -> None:
            control.engines += 1
            data, self.marked, self.flags = pickle.loads(plan)  # noqa: S301 - made by this very class
            self.model = onnx.ModelProto()
            self.model.ParseFromString(data)
            self.running, self.refitting = 0, False
            self.lock = threading.Lock()

        @property
        def num_io_tensors(self) -> int:
            return len(self.model.graph.input) + len(self.model.graph.output)

        def get_tensor_name(self, index: int) -> str:
            names = [str(value.name) for value in (*self.model.graph.input, *self.model.graph.output)]
            return names[index]

        def get_tensor_location(self, tensor: str) -> str:
            return "DEVICE"

        def create_execution_context(self, config: Any = None) -> Context:
            if config is not None and config.cache is not None:
                config.cache.kernels.add("compiled")
            return Context(self)

        def create_runtime_config(self) -> RuntimeConfig:
            return RuntimeConfig()

        def infer(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            with self.lock:
                assert not self.refitting, "an inference during a refit"
                self.running += 1
            try:
                session = ort.InferenceSession(self.model.SerializeToString(), providers=["CPUExecutionProvider"])
                results: list[np.ndarray] = session.run(None, feeds)
                return results
            finally:
                with self.lock:
                    self.running -= 1

    class RuntimeCache:
        def __init__(self) -> None:
            self.kernels: set[str] = set()

        def deserialize(self, blob: bytes) -> bool:
            if not blob.startswith(b"kernels "):
                return False
            self.kernels.update(blob.decode().split()[1:])
            return True

        def serialize(self) -> bytes:
            return " ".join(["kernels", *sorted(self.kernels)]).encode()

    class RuntimeConfig:
        def __init__(self) -> None:
            self.cache: RuntimeCache | None = None

        def create_runtime_cache(self) -> RuntimeCache:
            return RuntimeCache()

        def set_runtime_cache(self, cache: RuntimeCache) -> bool:
            self.cache = cache
            return True

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                return Engine(plan)
            except pickle.UnpicklingError:
                self.logger.log(Severity.ERROR, "not a plan")
                return None

    class Refitter:
        def __init__(self, engine: Engine, logger: Any) -> None:
            self.engine, self.logger = engine, logger
            self.given: dict[str, Weights] = {}

        def _tensor(self, weight: str) -> Any:
            return next(t for t in self.engine.model.graph.initializer if t.name == weight)

        def get_all_weights(self) -> list[str]:
            return [weight for weight in self.engine.marked if weight not in control.hidden]

        def get_weights_prototype(self, weight: str) -> Weights:
            array = onnx.numpy_helper.to_array(self._tensor(weight))
            return Weights(_BY_NUMPY[array.dtype], 0, array.size)

        def set_named_weights(self, weight: str, value: Weights, location: str) -> bool:
            prototype = self.get_weights_prototype(weight)
            if (prototype.dtype, prototype.size) != (value.dtype, value.size):
                return False
            self.given[weight] = value
            return True

        def unset_named_weights(self, weight: str) -> bool:
            return self.given.pop(weight, None) is not None

        def get_missing_weights(self) -> list[str]:
            return []  # as TensorRT-RTX: it leaves weights out

        def refit_cuda_engine_async(self, stream: int) -> bool:
            with self.engine.lock:
                assert self.engine.running == 0, "a refit during an inference"
                self.engine.refitting = True
            try:
                control.before_refit()
                fail = control.refits_to_fail > 0
                names = list(self.given)[: len(self.given) // 2] if fail else list(self.given)
                for weight in names:
                    tensor = self._tensor(weight)
                    tensor.raw_data = read(self.given[weight], tuple(tensor.dims)).tobytes()
                if fail:
                    control.refits_to_fail -= 1
                    self.logger.log(Severity.ERROR, "the fake failed half way")
                    return False
                control.refits += 1
                return True
            finally:
                with self.engine.lock:
                    self.engine.refitting = False

    flags = ("REFIT_INDIVIDUAL", "STRIP_PLAN", "TF32", "VERSION_COMPATIBLE")
    module = SimpleNamespace(
        ILogger=ILogger,
        IOutputAllocator=type("IOutputAllocator", (), {"__init__": lambda self: None}),
        DataType=DataType,
        Weights=Weights,
        TensorLocation=SimpleNamespace(HOST="HOST", DEVICE="DEVICE"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
        BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        Builder=Builder,
        IBuilderConfig=BuilderConfig,
        IOptimizationProfile=Profile,
        INetworkDefinition=Network,
        IExecutionContext=Context,
        ICudaEngine=Engine,
        IRuntimeConfig=RuntimeConfig,
        IRuntimeCache=RuntimeCache,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        Refitter=Refitter,
    )
    return Bindings(module, name, version)


def check_is_device(device: Device) -> Device:
    """The fake is what the adapter's protocol asks for (mypy checks it here)."""
    return device


check_is_device(FakeDevice())

__all__ = ["Control", "EngineError", "FakeDevice", "fake_bindings"]
