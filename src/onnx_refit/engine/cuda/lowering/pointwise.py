"""Elementwise operators that feed each other, as one kernel (PyTorch's jiterator compiles it at first use)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda.lowering.drafts import Draft, Flow
from onnx_refit.engine.cuda.lowering.operators import OPERATORS, Node, Tensor, operator

_OPERANDS = 8  # what the jiterator takes
_NODES = 24

_BINARY = {"Add": "({0} + {1})", "Sub": "({0} - {1})", "Mul": "({0} * {1})", "Div": "({0} / {1})"}
_UNARY = {
    "Relu": "({0} < 0.0f ? 0.0f : {0})",
    "Sigmoid": "(1.0f / (1.0f + expf(-{0})))",
    "Tanh": "tanhf({0})",
    "Erf": "erff({0})",
    "Exp": "expf({0})",
    "Log": "logf({0})",
    "Sqrt": "sqrtf({0})",
    "Neg": "(-{0})",
    "Abs": "fabsf({0})",
    "Reciprocal": "(1.0f / {0})",
}


def _known(draft: Draft, scalars: Mapping[str, float]) -> bool:
    if draft.op_type == "Clip":
        return all(not name or name in scalars for name in draft.inputs[1:])
    if draft.op_type in _UNARY:
        return True
    return draft.op_type in _BINARY or (draft.op_type == "Sum" and len(draft.inputs) >= 2)


def join(
    drafts: Sequence[Draft], outputs: Sequence[str], hosted: set[str], scalars: Mapping[str, float]
) -> list[Draft]:
    """Put elementwise operators that only feed each other together.

    Args:
        drafts: the nodes in order.
        outputs: the graph's outputs.
        hosted: values on the host; what only they feed is left alone.
        scalars: constants of one element.
    """
    flow = Flow(drafts, outputs)

    def able(draft: Draft | None) -> bool:
        return draft is not None and _known(draft, scalars) and not all(name in hosted for name in draft.inputs if name)

    swallowed: set[str] = set()
    joined: dict[str, Draft] = {}
    for root in reversed(drafts):
        if not able(root) or root.outputs[0] in swallowed:
            continue
        members, leaves = _grow(root, flow, able, swallowed, scalars)
        if len(members) > 1:
            swallowed.update(member.outputs[0] for member in members if member is not root)
            joined[root.outputs[0]] = replace(
                root,
                op_type="_Pointwise",
                inputs=tuple(leaves),
                attributes={"members": tuple(members), "leaves": tuple(leaves), "scalars": scalars},
            )
    return [joined.get(draft.outputs[0], draft) for draft in drafts if draft.outputs[0] not in swallowed]


def _grow(
    root: Draft, flow: Flow, able: Callable[[Draft | None], bool], taken: set[str], scalars: Mapping[str, float]
) -> tuple[list[Draft], list[str]]:
    """The operators that one kernel can compute, in order, and what it reads."""
    members = [root]
    leaves = list(dict.fromkeys(name for name in root.inputs if name and name not in scalars))
    growing = True
    while growing and len(members) < _NODES:
        growing = False
        for name in leaves:
            maker = flow.makers.get(name)
            if maker is None or flow.uses[name] != 1 or not able(maker) or name in taken:
                continue
            inputs = [other for other in maker.inputs if other and other not in scalars]
            wider = list(dict.fromkeys([*(leaf for leaf in leaves if leaf != name), *inputs]))
            if len(wider) <= _OPERANDS:
                members.insert(0, maker)
                leaves, growing = wider, True
                break
    return _in_order(members), leaves


def _in_order(members: list[Draft]) -> list[Draft]:
    """Makers before readers."""
    ordered: list[Draft] = []
    made: set[str] = set()
    names = {member.outputs[0] for member in members}
    left = list(members)
    while left:
        for member in left:
            if all(name not in names or name in made for name in member.inputs):
                ordered.append(member)
                made.add(member.outputs[0])
                left.remove(member)
                break
    return ordered


@operator("_Pointwise")
def pointwise(node: Node, *operands: Tensor) -> Tensor:
    """Run the kernel on a GPU in float32; the operators one after the other elsewhere."""
    if all(operand.is_cuda and operand.dtype is torch.float32 for operand in operands) and _can_compile():
        return _kernel(code(node, len(operands)))(*operands)
    return _step_by_step(node, operands)


def _step_by_step(node: Node, operands: Sequence[Tensor]) -> Tensor:
    names = list(node.get("leaves"))
    values: dict[str, Tensor] = dict(zip(names, operands, strict=True))
    scalars = node.get("scalars")
    result: Tensor = operands[0]
    for member in node.get("members"):
        given = [
            None if not name else values[name] if name in values else _scalar(scalars[name], operands[0], node)
            for name in member.inputs
        ]
        inner = Node(member.op_type, member.name, node.opset, 1, member.attributes, node.real)
        result = values[member.outputs[0]] = OPERATORS[member.op_type].function(inner, *given)
    return result


def _scalar(value: float, like: Tensor, node: Node) -> Tensor:
    return torch.full((), value, dtype=node.real if like.is_floating_point() else like.dtype, device=like.device)


def code(node: Node, count: int) -> str:
    """The kernel's source."""
    names: Sequence[str] = node.get("leaves")
    known = {name: f"a{index}" for index, name in enumerate(names)}
    scalars = node.get("scalars")
    lines = []
    for index, member in enumerate(node.get("members")):
        operands = [
            "" if not name else known[name] if name in known else literal(scalars[name]) for name in member.inputs
        ]
        lines.append(f"T r{index} = {_expression(member, operands)};")
        known[member.outputs[0]] = f"r{index}"
    parameters = ", ".join(f"T a{index}" for index in range(count))
    body = "\n  ".join(lines)
    return f"template <typename T> T joined({parameters}) {{\n  {body}\n  return r{len(lines) - 1};\n}}"


def literal(value: float) -> str:
    """A float32 number as C++ writes it, exactly."""
    single = float(np.float32(value))
    if single in (float("inf"), float("-inf")):
        return f"({'-' if single < 0 else ''}__int_as_float(0x7f800000))"
    if single != single:
        return "__int_as_float(0x7fc00000)"
    return f"({single:.9e}f)"


def _expression(member: Draft, operands: Sequence[str]) -> str:
    if member.op_type in _UNARY:
        return _UNARY[member.op_type].format(*operands)
    if member.op_type == "Sum":
        return "(" + " + ".join(operands) + ")"
    if member.op_type == "Clip":
        low = operands[1] if len(operands) > 1 and operands[1] else _bound(member.attributes.get("min"))
        high = operands[2] if len(operands) > 2 and operands[2] else _bound(member.attributes.get("max"))
        text = operands[0]
        if low:
            text = f"({text} < {low} ? {low} : {text})"
        return f"({text} > {high} ? {high} : {text})" if high else text
    return _BINARY[member.op_type].format(*operands)


def _bound(value: Any) -> str:
    return "" if value is None else literal(float(value))


@cache
def _can_compile() -> bool:
    return hasattr(torch.cuda, "jiterator")


@cache
def _kernel(source: str) -> Callable[..., Tensor]:
    return torch.cuda.jiterator._create_jit_fn(source)  # type: ignore[no-any-return]
