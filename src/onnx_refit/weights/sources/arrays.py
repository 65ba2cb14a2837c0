"""A mapping of names to arrays: NumPy, PyTorch on any device, or anything that speaks DLPack."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from onnx_refit.errors import MissingExtraError, ModelError, OnnxRefitError, WeightsError
from onnx_refit.moves.roll import Called, Form, Roll
from onnx_refit.tensors import Array, TensorSpec, dtype_name, numpy_dtype

_CPU_DEVICES = {1, 3}  # kDLCPU, kDLCUDAHost
_CUDA = 2  # kDLCUDA
# What torch and NumPy do not share: how torch names it -> (torch dtype of the same width, NumPy dtype).
_TORCH_ONLY: dict[str, tuple[str, np.dtype[np.generic]]] = {
    "torch.bfloat16": ("int16", np.dtype(ml_dtypes.bfloat16)),
    "torch.float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "torch.float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}
_TORCH_NAMES = {
    "torch.bfloat16": "bfloat16",
    "torch.float8_e4m3fn": "float8e4m3fn",
    "torch.float8_e5m2": "float8e5m2",
}
# What needs no closer look: a mapping may hold thousands of arrays.
_NATIVE: dict[np.dtype[Any], str] = {
    np.dtype(dtype): dtype_name(dtype) for dtype in (np.float32, np.float16, np.float64, np.int8, np.uint8, np.int64)
}


MAPPING = "mapping"
"""What a mapping is called in messages."""

_TEXT = frozenset({str})
_ARRAY = frozenset({np.ndarray})
_SINGLE = np.dtype(np.float32)  # asked after by identity: looking a dtype up takes as long as all other questions


def form_of(spec: TensorSpec) -> Form | None:
    """The form of a tensor of static shape; None for a dtype that takes a closer look."""
    dtype = numpy_dtype(spec.dtype)
    return (spec.name, dtype, spec.static_shape) if dtype in _NATIVE else None


def is_torch_tensor(value: object) -> bool:
    """Whether a value is a PyTorch tensor, without importing PyTorch."""
    kind = type(value)
    known = _IS_TORCH.get(kind)
    if known is None:
        known = any(c.__module__.startswith("torch") and c.__name__ == "Tensor" for c in kind.__mro__)
        _IS_TORCH[kind] = known
    return known


_IS_TORCH: dict[type[Any], bool] = {}
"""Which classes are PyTorch's tensors, as far as they came up."""


def torch_to_numpy(tensor: Any, *, where: str) -> Array:
    """A PyTorch tensor as a host array: shares memory on the CPU, copied from a GPU.

    Raises:
        WeightsError: it is sparse, quantised, on the meta device, or of a dtype NumPy lacks.
    """
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise WeightsError(f"the tensor is {kind}, not dense", where=where, hint="Pass a dense tensor with data")
    host = tensor.detach().cpu().resolve_conj().resolve_neg()
    name = str(host.dtype)
    try:
        if name in _TORCH_ONLY:
            same_width, dtype = _TORCH_ONLY[name]
            shape = tuple(host.shape)
            flat = host.contiguous().view(getattr(torch, same_width)).numpy()
            result: Array = flat.view(dtype).reshape(shape)
            return result
        result = host.numpy()
    except (TypeError, RuntimeError) as error:
        raise WeightsError(f"dtype {name} cannot become an array: {error}", where=where) from error
    return result


def to_array(value: object, *, where: str) -> Array:
    """Any array-like with a dtype as a host array, without copying where both sides can.

    Raises:
        WeightsError: it is no array, or holds objects or text.
        MissingExtraError: it is on a GPU and PyTorch, which brings it to the host, is not installed.
    """
    array = _to_numpy(value, where=where)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        name = dtype_name(array.dtype)
    except ModelError as error:
        raise WeightsError(error.message, where=where) from error
    if name == "string":
        raise WeightsError("it holds objects or text, not numbers", where=where)
    return array


def _to_numpy(value: object, *, where: str) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    if is_torch_tensor(value):
        return torch_to_numpy(value, where=where)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value, where=where)
    if hasattr(value, "__array__"):
        return np.asarray(value)
    raise WeightsError(
        f"a value of type {type(value).__name__} is no tensor",
        where=where,
        hint="Pass NumPy arrays, torch tensors or anything with __dlpack__",
    )


def _from_dlpack(value: Any, *, where: str) -> Array:
    try:
        device = int(value.__dlpack_device__()[0])
        if device in _CPU_DEVICES:
            try:
                return np.from_dlpack(value)
            except (BufferError, RuntimeError, TypeError, ValueError):
                if hasattr(value, "__array__"):  # bfloat16 and the like, which NumPy's DLPack does not know
                    return np.asarray(value)
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "torch", "reading a tensor on a GPU through DLPack") from error
        return torch_to_numpy(torch.from_dlpack(value), where=where)
    except OnnxRefitError:
        raise
    except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"the DLPack exchange failed: {error}", where=where) from error


class ArraysSource:
    """Named arrays in memory, read without copying where they are on the host.

    Args:
        arrays: name -> array; the mapping is copied, the arrays are not.
        description: where they come from, for messages.

    Raises:
        WeightsError: a name is no text, or a value is no tensor of numbers.
    """

    def __init__(self, arrays: Mapping[str, object], description: str = MAPPING) -> None:
        self._description = description
        self._values = dict(arrays)
        self._others: dict[str, TensorSpec] = {}
        if {*map(type, self._values)} <= _TEXT and {*map(type, self._values.values())} <= _ARRAY:
            # Thousands of them, perhaps: most are told by identity alone.
            left = [item for item in self._values.items() if item[1].dtype is not _SINGLE]  # type: ignore[attr-defined]
        else:
            left = list(self._values.items())
        for name, value in left:
            if not isinstance(name, str):
                raise WeightsError(f"the name {name!r} is no text", where=description)
            if type(value) is np.ndarray and (value.dtype is _SINGLE or value.dtype in _NATIVE):
                continue
            where = f"{description}[{name!r}]"
            if not is_torch_tensor(value) and _on_gpu(value):
                value = self._values[name] = _shared_with_torch(value, where)
            if is_torch_tensor(value):
                self._others[name] = _torch_spec(name, value, where)
            else:
                array = to_array(value, where=where)
                self._values[name] = array
                self._others[name] = TensorSpec(name, dtype_name(array.dtype), array.shape)

    @property
    def description(self) -> str:
        """What was given when it was made (``"mapping"``)."""
        return self._description

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor, in the order of the mapping."""
        return MappingProxyType({name: self._others.get(name) or self._native(name) for name in self._values})

    def _native(self, name: str) -> TensorSpec:
        array: Any = self._values[name]
        return TensorSpec(name, _NATIVE[array.dtype], array.shape)

    def plain(self, roll: Roll) -> Called | None:
        """All tensors, if they are exactly those of the roll."""
        return roll.call(self._values)

    def plain_part(self, specs: Mapping[str, TensorSpec]) -> dict[str, Array] | None:
        """All tensors, if they are some of these, as ``plain`` wants them, by name; else None."""
        found: dict[str, Array] = {}
        for name, array in self._values.items():
            spec = specs.get(name)
            if spec is None or not _is_plain(array, spec):
                return None
            found[name] = array
        return found

    @property
    def values(self) -> Mapping[str, object]:
        """Name -> value as it was given, on its own device."""
        return self._values

    def raw(self, name: str) -> object:
        """The value as it was given, on its own device; WeightsError if there is none of that name."""
        if name not in self._values:
            raise WeightsError(f"holds no tensor {name!r}", where=self._description)
        return self._values[name]

    def same_memory(self, name: str, other: str) -> bool:
        """Whether two of them are tensors of PyTorch over the very same memory, so that their elements are the same."""
        one, two = self._values.get(name), self._values.get(other)
        if one is None or two is None or not (is_torch_tensor(one) and is_torch_tensor(two)):
            return False
        left, right = ((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in (one, two))  # type: ignore[attr-defined]
        return bool(left == right and left[0])

    def read(self, name: str) -> Array:
        """One tensor as a host array; WeightsError if there is none of that name."""
        value = self.raw(name)
        if isinstance(value, np.ndarray):
            return value
        return to_array(value, where=f"{self._description}[{name!r}]")

    def close(self) -> None:
        """Let go of the arrays, and of what nobody asked for yet; those already read stay valid."""
        self._values = {}


def _is_plain(value: object, spec: TensorSpec) -> TypeGuard[Array]:
    return (
        type(value) is np.ndarray
        and value.shape == spec.shape
        and _NATIVE.get(value.dtype) == spec.dtype
        and value.flags.c_contiguous
    )


def _on_gpu(value: object) -> bool:
    """Whether another library than PyTorch has it on an NVIDIA GPU."""
    try:
        return hasattr(value, "__dlpack__") and int(value.__dlpack_device__()[0]) == _CUDA  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
        return False


def _shared_with_torch(value: Any, where: str) -> Any:
    """A tensor of another library as PyTorch's over the same memory, so that it stays where it is."""
    try:
        import torch

        return torch.from_dlpack(value)
    except ImportError as error:
        raise MissingExtraError("torch", "torch", "reading a tensor on a GPU through DLPack") from error
    except (RuntimeError, TypeError, ValueError, BufferError) as error:
        raise WeightsError(f"the DLPack exchange failed: {error}", where=where) from error


def _torch_spec(name: str, tensor: Any, where: str) -> TensorSpec:
    """The spec of a torch tensor without bringing it to the host."""
    dtype = _torch_dtype(tensor.dtype)
    if dtype is None:
        raise WeightsError(f"dtype {tensor.dtype} is not supported", where=where)
    return TensorSpec(name, dtype, tuple(tensor.shape))


@lru_cache(maxsize=256)
def _torch_dtype(dtype: object) -> str | None:
    code = str(dtype)
    try:
        return _TORCH_NAMES.get(code) or dtype_name(code.removeprefix("torch."))
    except (TypeError, ModelError):
        return None
