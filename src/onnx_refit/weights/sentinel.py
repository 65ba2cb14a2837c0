"""Exporting a PyTorch module so that the origin of every weight is beyond doubt.

The module is exported with values that occur nowhere twice, so that no exporter finds equal tensors to merge or zeros
to leave out, and each weight can have come from one place only. Then the real values are put in.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import numpy_helper

from onnx_refit.errors import MissingExtraError, ModelError
from onnx_refit.tensors import is_floating
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.names import Discovery, find_names
from onnx_refit.weights.sources.arrays import ArraysSource
from onnx_refit.weights.sources.onnx_model import OnnxModelSource

_SEED = 0x5EED


@dataclass(frozen=True)
class Exported:
    """A module as an ONNX model, and where its weights come from.

    Attributes:
        model: the model, with the module's own values.
        discovery: which entry of the state dict each weight is; no ties.
    """

    model: onnx.ModelProto
    discovery: Discovery


def export_module(
    module: Any, example_inputs: Sequence[Any], *, dynamo: bool = True, options: dict[str, Any] | None = None
) -> Exported:
    """Export a PyTorch module with the map from its state dict.

    The module is left as it was. BatchNorms that the exporter folds are folded again from the real values.

    Args:
        module: a ``torch.nn.Module``.
        example_inputs: positional inputs of its ``forward``.
        dynamo: which of PyTorch's exporters to use.
        options: more arguments of ``torch.onnx.export`` (``dynamic_shapes``, ``input_names``, ``opset_version``, ...).

    Raises:
        MissingExtraError: PyTorch (or for ``dynamo`` onnxscript) is not installed.
        ModelError: PyTorch cannot export the module, or a weight is not finite.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch", "exporting a PyTorch module") from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"a value of type {type(module).__name__} is no torch.nn.Module")
    with _sentinels(module):
        model = _export(module, tuple(example_inputs), dynamo, options or {})
        # Copied, because the state dict shares memory with the module, which is about to get its values back.
        checkpoint = ArraysSource(_copied(module.state_dict()))
        weights = OnnxModelSource(model)
        arrays = {name: weights.read(name) for name, spec in weights.specs.items() if is_floating(spec.dtype)}
        discovery = find_names(arrays, checkpoint, model)
    _fill(model, discovery, ArraysSource(dict(module.state_dict())))
    return Exported(model, discovery)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of tensors; what shared memory shares memory again."""
    copies: dict[tuple[object, ...], Any] = {}
    for tensor in state.values():
        copies.setdefault(_identity(tensor), tensor.detach().clone())
    return {name: copies[_identity(tensor)] for name, tensor in state.items()}


def _identity(tensor: Any) -> tuple[object, ...]:
    return (tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype)


@contextlib.contextmanager
def _sentinels(module: Any) -> Iterator[None]:
    """Give the module values of its own making, in evaluation mode, for a while."""
    import torch

    training = {name: part.training for name, part in module.named_modules()}
    tensors: dict[tuple[object, ...], tuple[str, Any]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensors.setdefault(_identity(tensor), (name, tensor))
    saved = [(tensor, tensor.detach().clone()) for _, tensor in tensors.values()]
    generator = torch.Generator().manual_seed(_SEED)
    try:
        module.eval()
        with torch.no_grad():
            for name, tensor in tensors.values():
                # Small, so that nothing overflows; positive where a root may be taken of it.
                value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.05
                if "var" in name:
                    value = value.abs() + 0.5
                tensor.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        for name, part in module.named_modules():
            part.training = training[name]


def _export(module: Any, inputs: tuple[Any, ...], dynamo: bool, options: dict[str, Any]) -> onnx.ModelProto:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                program = torch.onnx.export(module, inputs, dynamo=True, verbose=False, **options)
                data = program.model_proto.SerializeToString()
            else:
                buffer = io.BytesIO()
                torch.onnx.export(module, inputs, buffer, dynamo=False, **options)
                data = buffer.getvalue()
        return onnx.load_model_from_string(data)
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxscript", "torch", "exporting a PyTorch module") from error
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"PyTorch cannot export the module: {text}",
            where=type(module).__name__,
            hint="Try the other exporter, or other options of torch.onnx.export",
        ) from error


def _fill(model: onnx.ModelProto, discovery: Discovery, checkpoint: ArraysSource) -> None:
    """Put the values of a checkpoint where the sentinels stand."""
    view = MappedView(checkpoint, discovery.names)
    for tensor in _tensors(model.graph):
        if tensor.name in view.specs:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(view.read(name), name))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The tensors of a graph by the names that ``OnnxModelSource`` gives them."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                attribute.t.name = node.output[0]
                yield attribute.t
            for sub_graph in (attribute.g, *attribute.graphs):
                yield from _tensors(sub_graph)
