"""The one place that touches what onnxruntime's Python package keeps private.

``InferenceSession`` offers no way to bind the weights of a set once and to run with them from several threads at the
price of a baked session: its public ``run_with_ort_values`` wraps and copies every value at every call. The classes
below (``SessionIOBinding``, the C ``OrtValue``) are what that public class is made of; they have been there unchanged
since onnxruntime 1.4.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as capi

from onnx_refit.errors import EngineError
from onnx_refit.plan.evaluate import PACKED, ort_value, unpack
from onnx_refit.tensors import Array, TensorSpec, dtype_name, is_extension, numpy_dtype, onnx_dtype

PROVIDERS = ["CPUExecutionProvider"]
NCHWC_DOMAIN = "com.microsoft.nchwc"
_DEVICE = ort.OrtDevice.make("cpu", 0)._get_c_device()
_SINGLE = np.dtype(np.float32)
_SPIN = 1000  # microseconds: longer than what one thread of a run waits for another, mostly
# NumPy knows these only through ml_dtypes; ONNX Runtime takes them as raw integers with the ONNX type beside.
_RAW = {"bfloat16": np.uint16, "float8e4m3fn": np.uint8, "float8e5m2": np.uint8}

_RAW_BY_ONNX = {onnx_dtype(name): name for name in _RAW}
_PACKED_BY_ONNX = {onnx_dtype(name): name for name in PACKED}

Value = Any
"""A C ``OrtValue``."""


def wrap(array: Array) -> Value:
    """An OrtValue over the array's own memory (the caller keeps the array alive); C-contiguous arrays only."""
    if array.dtype is _SINGLE:
        return capi.OrtValue.ortvalue_from_numpy(array, _DEVICE)
    name = dtype_name(array.dtype)
    raw = _RAW.get(name)
    if raw is not None:
        return capi.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(raw), onnx_dtype(name))
    return capi.OrtValue.ortvalue_from_numpy(array, _DEVICE)


def owned(array: Array) -> tuple[Value, Array]:
    """An OrtValue of a C-contiguous array, and the array that owns its memory: a packed copy of four-bit elements."""
    if dtype_name(array.dtype) not in PACKED:
        return wrap(array), array
    value, owner = ort_value(array)
    return value._ortvalue, owner


def public_value(value: Value) -> ort.OrtValue:
    """The public OrtValue around a C one."""
    return ort.OrtValue(value)


def unwrap(value: Value) -> Array:
    """The array of an OrtValue, over its own memory where NumPy has the type."""
    packed = _PACKED_BY_ONNX.get(value.element_type())
    if packed is not None:
        spec = TensorSpec("", packed, tuple(value.shape()))
        return unpack(np.frombuffer(ctypes.string_at(value.data_ptr(), (spec.size + 1) // 2), np.uint8), spec)
    raw = _RAW_BY_ONNX.get(value.element_type())
    if raw is None:
        array: Array = value.numpy()
        return array
    name, shape = raw, tuple(value.shape())
    dtype = numpy_dtype(name)
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def session_options(
    threads: int, *, optimise: bool = False, spinning: bool = True, arena: bool = True, spin: int = _SPIN
) -> ort.SessionOptions:
    """Session options of this engine: everything of ONNX Runtime's optimiser, or nothing.

    Without an arena a session keeps no memory between its runs, which take a little longer for it. Its threads turn for
    ``spin`` microseconds when there is nothing to do, if they are ``spinning``.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    options.log_severity_level = 4  # errors come as exceptions
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        # By itself an idle thread turns for about 30 ms after each run, on a core that a refit or a request needs.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
    return options


def make_session(
    model: onnx.ModelProto | bytes, options: ort.SessionOptions, *, disabled: Sequence[str] = ()
) -> ort.InferenceSession:
    """A session on the CPU; EngineError with ONNX Runtime's own words where it refuses the model."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        if disabled:
            return ort.InferenceSession(data, options, providers=PROVIDERS, disabled_optimizers=list(disabled))
        return ort.InferenceSession(data, options, providers=PROVIDERS)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"ONNX Runtime refused the model: {error}") from error


def has_plain_outputs(session: ort.InferenceSession) -> bool:
    """Whether NumPy has the types of all the session's outputs."""
    return _plain(session.get_outputs())


def has_plain_inputs(session: ort.InferenceSession) -> bool:
    """Whether NumPy has the types of all the session's inputs."""
    return _plain(session.get_inputs())


def _plain(values: Iterable[Any]) -> bool:
    return not any(raw in value.type for value in values for raw in ("bfloat", "float8", "int4"))


def run_plain(session: ort.InferenceSession, outputs: Sequence[str], inputs: dict[str, Array]) -> list[Array]:
    """Run a session that has nothing bound: for few inputs this takes 25 us less than a binding."""
    try:
        results: list[Array] = session._sess.run(list(outputs), inputs, None)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"ONNX Runtime failed: {error}") from error
    return results


class Binding:
    """A session with some inputs bound to fixed values; one request at a time.

    Args:
        session: the session.
        values: input name -> value that stays bound (the caller keeps its memory alive).
        outputs: names of the outputs to compute, in the order wanted.
    """

    def __init__(self, session: ort.InferenceSession, values: Mapping[str, Value], outputs: Sequence[str]) -> None:
        self._session = session._sess
        self._io = capi.SessionIOBinding(session._sess)
        self._outputs = tuple(outputs)
        self._numbers = range(len(self._outputs))
        self._plain = has_plain_outputs(session)
        for name, value in values.items():
            self._io.bind_ortvalue_input(name, value)
        self._renew_outputs()

    def keep(self, owners: object) -> None:
        """Keep the owners of bound memory alive as long as this binding."""
        self._owners = owners

    def run(self, inputs: Iterable[tuple[str, Array]]) -> list[Array]:
        """Run with these further inputs; outputs in the order given at construction.

        A large model leaves none of this in the processor's caches: each thing done here takes 10 to 50 us, ten times
        as long as it would by itself. So as little as possible is done.
        """
        io = self._io
        owners = []
        for name, array in inputs:
            if array.dtype is _SINGLE or not is_extension(array.dtype):
                io.bind_input(name, array)
            else:
                value, owner = owned(array)
                owners.append(owner)
                io.bind_ortvalue_input(name, value)
        try:
            self._session.run_with_iobinding(io, None)
            values = io.get_outputs()
            # By number: the end of an iteration over them is a C++ exception, which takes 150 us after a large model.
            if self._plain:
                return [values[number].numpy() for number in self._numbers]
            return [unwrap(values[number]) for number in self._numbers]
        finally:
            self._renew_outputs()  # the results own their memory now

    def _renew_outputs(self) -> None:
        """Have the outputs made anew by the next run: they keep the last one's shape and memory otherwise."""
        io = self._io
        io.clear_binding_outputs()
        for name in self._outputs:
            io.bind_output(name, _DEVICE)


class Outlet:
    """A session that reads and writes memory bound to it, again and again; one call at a time.

    The caller keeps all that is bound alive while it runs. All arrays are C-contiguous.
    """

    __slots__ = ("_io", "_session")

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session._sess
        self._io = capi.SessionIOBinding(session._sess)

    def give(self, name: str, array: Array) -> None:
        """Bind an input."""
        self._io.bind_ortvalue_input(name, wrap(array))

    def take(self, name: str, array: Array) -> None:
        """Bind an output."""
        self._io.bind_ortvalue_output(name, wrap(array))

    def run(self) -> None:
        """Run with what is bound."""
        self._session.run_with_iobinding(self._io, None)
