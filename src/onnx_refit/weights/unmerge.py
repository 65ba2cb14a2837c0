"""Undoing what exporters do to equal tensors: they keep one and let all users share it.

A model exported with fresh weights has one tensor of zeros where the network has twenty biases. Refitted later with a
trained checkpoint, all twenty would get the value of one of them. So before names are looked for, every user gets a
tensor of its own again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_refit.errors import ModelError
from onnx_refit.tensors import Array, is_floating, onnx_dtype_name
from onnx_refit.weights.provenance.bits import arrangements, signature
from onnx_refit.weights.provenance.expression import Stored
from onnx_refit.weights.provenance.pool import Pool
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.onnx_model import OnnxModelSource


@dataclass(frozen=True)
class Split:
    """A tensor that its users no longer share.

    Attributes:
        name: the shared tensor.
        copies: the new names, one a user after the first.
        reason: how it was recognised.
    """

    name: str
    copies: tuple[str, ...]
    reason: str


def unmerge(
    model: onnx.ModelProto, checkpoint: WeightSource | None = None, directory: Path | None = None
) -> tuple[onnx.ModelProto, tuple[Split, ...]]:
    """Give every user of merged tensors its own.

    Two signs tell merged tensors: an Identity node between the shared tensor and a user (the TorchScript exporter
    writes one under the tensor's old name), and several equal but separate tensors in the checkpoint (the dynamo
    exporter leaves no other trace). Tensors that share storage in the checkpoint are tied for good and stay shared.

    Args:
        model: the model; it is not changed.
        checkpoint: the checkpoint that it was exported from.
        directory: where the model's external data lies.

    Returns:
        The model, the same object where there was nothing to do, and what was split.
    """
    shared = _shared(model)
    aliases = [node for node in model.graph.node if _is_alias(node, shared)]
    doubtful = [name for name, uses in shared.items() if uses > 1]
    several = _several(model, doubtful, checkpoint, directory) if checkpoint is not None else set()
    if not aliases and not several:
        return model, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    splits = [*_split_aliases(copy), *_split_uses(copy, several)]
    return copy, tuple(splits)


def _floating(tensor: onnx.TensorProto) -> bool:
    try:
        return is_floating(onnx_dtype_name(tensor.data_type))
    except ModelError:  # a type that this project lacks; whoever reads the tensor will say so
        return False


def _shared(model: onnx.ModelProto) -> dict[str, int]:
    """Floating-point initializers of the main graph -> how often nodes read them."""
    uses = {tensor.name: 0 for tensor in model.graph.initializer if _floating(tensor)}
    for node, index in _inputs(model.graph):
        if node.input[index] in uses:
            uses[node.input[index]] += 1
    return uses


def _inputs(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    for node in graph.node:
        yield from ((node, index) for index in range(len(node.input)))
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _inputs(attribute.g)


def _is_alias(node: onnx.NodeProto, shared: dict[str, int]) -> bool:
    return node.op_type == "Identity" and node.domain in ("", "ai.onnx") and node.input[0] in shared


def _several(model: onnx.ModelProto, names: list[str], checkpoint: WeightSource, directory: Path | None) -> set[str]:
    """The tensors that the checkpoint has more than once, in separate memory."""
    source = OnnxModelSource(model, directory)
    arrays = {name: source.read(name) for name in names}
    pool = Pool(checkpoint, (array.size for array in arrays.values()))
    found: set[str] = set()
    for name, array in arrays.items():
        equal: list[Array] = []
        for candidate in pool.alike(signature(array)):
            stored = pool.read(candidate)
            if next(arrangements(array, stored, Stored(candidate)), None) is None:
                continue
            if not any(np.shares_memory(stored, other) for other in equal):
                equal.append(stored)
        if len(equal) > 1:
            found.add(name)
    return found


def _split_aliases(model: onnx.ModelProto) -> Iterator[Split]:
    """Turn Identity nodes of initializers into initializers of their own."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer if _floating(tensor)}
    outputs = {value.name for value in graph.output}
    copies: dict[str, list[str]] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in tensors and node.output[0] not in outputs:
            copies.setdefault(node.input[0], []).append(node.output[0])
            own = graph.initializer.add()
            own.CopyFrom(tensors[node.input[0]])
            own.name = node.output[0]
        else:
            kept.append(node)
    if not copies:
        return
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    for name, new in copies.items():
        yield Split(name, tuple(new), "an Identity node keeps the name of a merged tensor")


def _split_uses(model: onnx.ModelProto, names: set[str]) -> Iterator[Split]:
    """Give each use of a tensor its own copy; the first keeps the name."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken = set(tensors) | {value for node, _ in _inputs(graph) for value in (*node.input, *node.output)}
    seen: dict[str, int] = {}
    copies: dict[str, list[str]] = {}
    for node, index in list(_inputs(graph)):
        name = node.input[index]
        if name not in names:
            continue
        seen[name] = seen.get(name, 0) + 1
        if seen[name] == 1:
            continue
        number = seen[name]
        while (new := f"{name}.{number}") in taken:
            number += 1
        taken.add(new)
        copies.setdefault(name, []).append(new)
        own = graph.initializer.add()
        own.CopyFrom(tensors[name])
        own.name = new
        node.input[index] = new
    for name, names_ in copies.items():
        yield Split(name, tuple(names_), "the checkpoint has several separate tensors of these bits")
