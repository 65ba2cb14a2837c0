"""What shape inference knows about the values of a model, for the passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
from onnx import ModelProto, ValueInfoProto

from onnx_refit.model.graph import all_graphs, without_initializers
from onnx_refit.tensors import spec_of_value_info

_SMALL = 256
"""Up to this many elements, values may be a shape that inference needs."""

Dims = tuple[int | str | None, ...]
"""The dimensions of a value of known rank."""


class Shapes:
    """Shapes and element types of a model's values, as far as they are declared or can be inferred.

    Args:
        model: the model; it is not changed. Inference that fails leaves what the model declares.
    """

    def __init__(self, model: ModelProto) -> None:
        self._dims: dict[str, Dims] = {}
        self._types: dict[str, int] = {}
        light = without_weights(model)
        try:
            inferred = onnx.shape_inference.infer_shapes(light, check_type=False, strict_mode=False, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
            inferred = light
        for graph in all_graphs(inferred.graph):
            for tensor in graph.initializer:
                self._dims[tensor.name] = tuple(int(size) for size in tensor.dims)
                self._types[tensor.name] = tensor.data_type
            for value in (*graph.input, *graph.value_info, *graph.output):
                self._read(value)

    def _read(self, value: ValueInfoProto) -> None:
        if value.type.WhichOneof("value") != "tensor_type":
            return
        if code := value.type.tensor_type.elem_type:
            self._types.setdefault(value.name, code)
        if value.type.tensor_type.HasField("shape"):
            known = spec_of_value_info(value).shape
            if known is not None:
                self._dims.setdefault(value.name, known)

    def dims(self, name: str) -> Dims | None:
        """The dimensions of a value, None where even its rank is unknown."""
        return self._dims.get(name)

    def element_type(self, name: str) -> int | None:
        """The ONNX element type of a value, None where it is unknown."""
        return self._types.get(name)


def without_weights(model: ModelProto) -> ModelProto:
    """A copy for shape inference: large initializers of the main graph keep name, type and size but no values.

    Inference hands models through their serialised form, which costs as much as the weights are large, and cannot be
    above 2 GB.
    """
    light = without_initializers(model)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            light.graph.initializer.append(tensor)
        else:
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return light


def product(dims: Sequence[int | str | None]) -> int | None:
    """The number of elements of some dimensions; None unless all are numbers."""
    numbers = [size for size in dims if isinstance(size, int)]
    return math.prod(numbers) if len(numbers) == len(dims) else None
