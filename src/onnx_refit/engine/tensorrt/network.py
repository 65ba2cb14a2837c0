"""From a compiled model to a TensorRT network: weights named and marked refittable one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from onnx_refit.engine.tensorrt.bindings import Bindings, last_errors
from onnx_refit.errors import EngineError, UnsupportedModelError
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import Array, TensorSpec, onnx_dtype

_LARGEST_INLINE = 2**31 - 2**20  # a protobuf holds at most 2 GB


@dataclass(frozen=True)
class Network:
    """A parsed network and what must outlive it.

    Attributes:
        builder: TensorRT's builder.
        network: TensorRT's network definition.
        parser: the parser, which owns what it read.
        weights: engine weight name -> array; the network points into them until it is built.
    """

    builder: Any
    network: Any
    parser: Any
    weights: Mapping[str, Array]


def graph_with_weights(compiled: CompiledModel, weights: Mapping[str, Array] | None) -> ModelProto:
    """The activation graph as an ordinary model: its engine weights are initializers again.

    Args:
        compiled: the compiled model.
        weights: engine weight name -> array, to lie inside the model; None leaves placeholders for external data,
            which ``parse`` fills without a copy.
    """
    model = ModelProto()
    model.CopyFrom(compiled.activation)
    names = {spec.name for spec in compiled.engine_weights}
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for spec in compiled.engine_weights:
        if weights is not None:
            model.graph.initializer.append(onnx.numpy_helper.from_array(weights[spec.name], spec.name))
        else:
            model.graph.initializer.append(_placeholder(spec))
    return model


def _placeholder(spec: TensorSpec) -> TensorProto:
    tensor = TensorProto(name=spec.name, data_type=onnx_dtype(spec.dtype), dims=spec.static_shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights"), ("offset", "0"), ("length", str(spec.nbytes))):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    return tensor


def parse(bindings: Bindings, logger: Any, compiled: CompiledModel, weights: Mapping[str, Array]) -> Network:
    """Parse a compiled model.

    Where the parser takes initializers by address (``load_initializer``), no weight is copied; older ones get the
    model with the weights inside.

    Args:
        bindings: TensorRT.
        logger: a logger of these bindings.
        compiled: the compiled model.
        weights: engine weight name -> array; kept alive by the result.

    Raises:
        UnsupportedModelError: the parser refused, with each node and its reason.
    """
    trt = bindings.module
    held = {spec.name: np.ascontiguousarray(weights[spec.name]) for spec in compiled.engine_weights}
    for spec in compiled.engine_weights:
        bindings.data_type(spec.dtype, spec.name)
    builder = trt.Builder(logger)
    if builder is None:
        raise EngineError(f"TensorRT made no builder: {last_errors(logger)}")
    network = builder.create_network(_network_flags(bindings))
    parser = trt.OnnxParser(network, logger)
    total = sum(array.nbytes for array in held.values())
    if bindings.has("OnnxParser", "load_initializer"):
        model = graph_with_weights(compiled, None).SerializeToString()
        accepted = parser.load_model_proto(model)
        for name, array in held.items():
            accepted = accepted and parser.load_initializer(name, array.ctypes.data, array.nbytes)
        accepted = accepted and parser.parse_model_proto()
    elif total < _LARGEST_INLINE:
        accepted = parser.parse(graph_with_weights(compiled, held).SerializeToString())
    else:
        raise EngineError(f"{bindings.label} takes models of at most 2 GB", hint="Use a newer TensorRT")
    if not accepted:
        raise UnsupportedModelError(
            f"TensorRT's parser refused the model: {'; '.join(parser_errors(parser)) or last_errors(logger)}",
            hint="onnx-refit check-tensorrt MODEL shows every node and which rewrites help",
        )
    logger.errors.clear()
    return Network(builder, network, parser, held)


def _network_flags(bindings: Bindings) -> int:
    # Strong typing keeps the graph's own dtypes; from version 11 (and in every RTX) there is nothing else.
    if bindings.is_rtx or bindings.major >= 11:
        return 0
    return 1 << int(bindings.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def parser_errors(parser: Any) -> list[str]:
    """What the parser said, one line an error."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        place = f"node {error.node_name() or error.node()} ({error.node_operator()})" if error.node() >= 0 else "model"
        lines.append(f"{place}: {' '.join(error.desc().split())}")
    return lines


def mark_refittable(logger: Any, network: Any, names: Iterable[str]) -> None:
    """Mark these weights refittable, one by one; EngineError naming those that TensorRT does not know.

    The plain REFIT flag lets TensorRT choose, and it may drop a bias of a product from the choice (release notes of
    TensorRT 11.3, known issues). A weight that could not be refitted would keep its old value for ever.
    """
    refused = [name for name in names if not network.mark_weights_refittable(name)]
    if refused:
        raise EngineError(
            f"TensorRT cannot refit {len(refused)} weights: {', '.join(refused[:5])} ({last_errors(logger)})",
            hint="Name them in BuildOptions(constant=...) to bake them in",
        )
