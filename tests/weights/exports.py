"""PyTorch models exported twice with other weights: the second export tells whether the map of the first is right."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from onnx_refit.tensors import Array
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.provenance.expression import BatchNormFold


def export(model: torch.nn.Module, args: tuple[torch.Tensor, ...], *, dynamo: bool, optimize: bool = True, **options):
    """Export to a ModelProto with all weights inside."""
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(model, args, dynamo=True, optimize=optimize, verbose=False, **options)
            return onnx.load_model_from_string(program.model_proto.SerializeToString())
        buffer = io.BytesIO()
        torch.onnx.export(model, args, buffer, dynamo=False, **options)
        return onnx.load_model_from_string(buffer.getvalue())


def weights_of(model: onnx.ModelProto, minimum: int = 2) -> dict[str, Array]:
    """The floating-point initializers."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {n: a for n, a in arrays.items() if a.dtype.kind == "f" and a.size >= minimum}


def state_of(model: torch.nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter and float buffer values of its own; shared ones stay shared."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.copy_(value.abs() + 0.5 if "var" in name else value)


def anonymise(model: onnx.ModelProto, seed: int) -> dict[str, str]:
    """Rename all initializers to numbers in random order, and nodes too; old name -> new name."""
    names = [t.name for t in model.graph.initializer]
    shuffled = list(range(len(names)))
    random.Random(seed).shuffle(shuffled)
    new = {name: str(1000 + number) for name, number in zip(names, shuffled, strict=True)}
    for tensor in model.graph.initializer:
        tensor.name = new[tensor.name]
    order = sorted(range(len(names)), key=lambda i: shuffled[i])
    tensors = [onnx.TensorProto.FromString(model.graph.initializer[i].SerializeToString()) for i in order]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)

    def walk(graph: onnx.GraphProto) -> None:
        for i, node in enumerate(graph.node):
            node.name = f"n{i}"
            del node.metadata_props[:]
            for k, value in enumerate(node.input):
                node.input[k] = new.get(value, value)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(model.graph)
    return new


def places(model: onnx.ModelProto, weights: dict[str, Array]) -> list[tuple[str, int, str]]:
    """(operator, input, weight) of every use of a weight in graph order, looking through Identity nodes."""
    alias: dict[str, str] = {}
    found = []
    for node in model.graph.node:
        if node.op_type == "Identity" and alias.get(node.input[0], node.input[0]) in weights:
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
            continue
        for index, value in enumerate(node.input):
            name = alias.get(value, value)
            if name in weights:
                found.append((node.op_type, index, name))
    return found


def matches(found, name: str, value: Array, expected: Array) -> bool:
    """Bit for bit, but for folds: PyTorch's square root is not correctly rounded, so a last bit may differ."""
    if isinstance(found.names.entries[name], BatchNormFold):
        return value.shape == expected.shape and np.allclose(value, expected, rtol=1e-6, atol=1e-7)
    return np.array_equal(value, expected)


def compare(found, first: onnx.ModelProto, second: onnx.ModelProto, second_state: dict[str, Array]):
    """(weights that come out wrong, weights that do not come out) when the map is applied to the second checkpoint.

    Weights of the two exports correspond by the places where they are used.
    """
    from onnx_refit.weights.sources.arrays import ArraysSource

    first_weights, second_weights = weights_of(first), weights_of(second)
    here, there = places(first, first_weights), places(second, second_weights)
    for p, q in zip(here, there, strict=False):
        assert p[:2] == q[:2], f"the exports differ: {p} {q}"
    assert len(here) == len(there)
    view = MappedView(ArraysSource(second_state), found.names)
    wrong, absent = [], []
    for (_, _, name), (_, _, other) in zip(here, there, strict=True):
        if name not in view.specs:
            absent.append((name, other))
        elif not matches(found, name, view.read(name), second_weights[other]):
            wrong.append((name, other))
    return wrong, absent


ModelMaker = Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]
