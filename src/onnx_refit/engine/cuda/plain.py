"""Which engine weights need no work: the bytes of a source weight, read through strides.

A weight that the refit program only transposes or reshapes is kept as the source has it, and the network reads a
view of it: a refit is then a copy, and cuBLAS takes either order of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch

from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import TensorSpec

# Operators that read a matrix in either order at no cost, and at which operand; others would copy a strided weight.
_ANY_ORDER = {"MatMul": (0, 1), "Gemm": (0, 1)}


@dataclass(frozen=True)
class Plain:
    """An engine weight that is a view of a source weight.

    Attributes:
        source: name of the source weight.
        strides: of the view, in elements over the source's own bytes.
    """

    source: str
    strides: tuple[int, ...]


def plain_weights(compiled: CompiledModel) -> dict[str, Plain]:
    """Engine weight name -> the view that it is, for those that are one."""
    program, found = compiled.program, {}
    engine = {spec.name: spec for spec in compiled.engine_weights}
    for name, source in program.passthrough.items():
        found[name] = Plain(source, _contiguous(engine[name].static_shape))
    if program.model is None:
        return found
    graph = program.model.graph
    makers = {node.output[0]: node for node in graph.node if node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {source.spec.name: source.spec.static_shape for source in compiled.sources}
    users = _users(compiled.activation)
    for name, spec in engine.items():
        if name in found or name not in makers:
            continue
        view = _view(name, makers, constants, shapes)
        if view is not None and _welcome(spec, view, users.get(name, [])):
            found[name] = view
    return found


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def _users(model: onnx.ModelProto) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            found.setdefault(name, []).append((node.op_type, place))
    return found


def _welcome(spec: TensorSpec, view: Plain, users: list[tuple[str, int]]) -> bool:
    if view.strides == _contiguous(spec.static_shape):
        return True
    return len(spec.static_shape) == 2 and all(place in _ANY_ORDER.get(kind, ()) for kind, place in users)


def _view(
    name: str,
    makers: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
    shapes: Mapping[str, tuple[int, ...]],
) -> Plain | None:
    """The view that an engine weight is of its source, followed through the program; None if it is computed."""
    chain = []
    while name in makers:
        node = makers[name]
        if node.op_type not in STEPS or node.domain not in ("", "ai.onnx"):
            return None
        chain.append(node)
        name = node.input[0]
    if name not in shapes:
        return None
    tensor = torch.empty(shapes[name], device="meta")
    for node in reversed(chain):
        arguments = [constants.get(extra) for extra in node.input[1:] if extra]
        if any(argument is None for argument in arguments):
            return None
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        values = [[int(v) for v in onnx.numpy_helper.to_array(a).reshape(-1)] for a in arguments if a is not None]
        try:
            tensor = STEPS[node.op_type](tensor, attributes, values)
        except (RuntimeError, ValueError, IndexError):  # no view of that shape exists
            return None
    return Plain(name, tuple(tensor.stride()))


def _transpose(x: Any, attributes: Mapping[str, Any], values: list[list[int]]) -> Any:
    return x.permute(list(attributes.get("perm") or range(x.dim() - 1, -1, -1)))


def _reshape(x: Any, attributes: Mapping[str, Any], values: list[list[int]]) -> Any:
    shape = values[0]
    if 0 in shape and attributes.get("allowzero", 0):
        raise ValueError("an empty weight")
    return x.view([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


def _squeeze(x: Any, attributes: Mapping[str, Any], values: list[list[int]]) -> Any:
    axes = values[0] if values else list(attributes.get("axes") or [a for a, size in enumerate(x.shape) if size == 1])
    return x.view([size for axis, size in enumerate(x.shape) if axis not in {a % x.dim() for a in axes}])


def _unsqueeze(x: Any, attributes: Mapping[str, Any], values: list[list[int]]) -> Any:
    axes = values[0] if values else list(attributes["axes"])
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


# Operators that only look at a tensor differently: (tensor, attributes, values of the other operands) -> view.
STEPS: dict[str, Any] = {
    "Identity": lambda x, attributes, values: x,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
