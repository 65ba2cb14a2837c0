"""Elementwise operators that feed each other, as one kernel, written and compiled when it is first needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.lowering.drafts import Draft, Flow
from onnx_refit.engine.cuda.lowering.operators import OPERATORS, Node, Tensor, operator

_OPERANDS = 8
_NODES = 24
RANK = 4
"""Dimensions that a kernel walks."""

_WIDE = 4  # elements of 16 bytes
_THREADS = 256

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


def is_formula(draft: Draft) -> bool:
    """Whether an operator can be written as an expression, whatever its operands are."""
    return draft.op_type in _UNARY or draft.op_type in _BINARY or (draft.op_type == "Sum" and len(draft.inputs) >= 2)


def _known(draft: Draft, scalars: Mapping[str, float]) -> bool:
    if draft.op_type == "Clip":
        return all(not name or name in scalars for name in draft.inputs[1:])
    return is_formula(draft)


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
    if all(operand.is_cuda and operand.dtype is torch.float32 for operand in operands) and kernels.available():
        walk = walk_of([operand.shape for operand in operands], [operand.stride() for operand in operands])
        if walk is not None:
            return _run(node, operands, walk)
    return _step_by_step(node, operands)


def _run(node: Node, operands: Sequence[Tensor], walk: Walk) -> Tensor:
    aligned = all(operand.data_ptr() % (4 * _WIDE) == 0 for operand in operands)
    wide = _WIDE if aligned and walk.wide else 1
    device = operands[0].device
    out = torch.empty(walk.shape, dtype=torch.float32, device=device)
    if not out.numel():
        return out
    kinds = tuple(int(strides[-1] != 0) for strides in walk.strides)
    function = kernels.compiled(code(node, kinds, wide), "joined", device.index, fused=False)
    sizes = [np.uint32(out.numel() // wide), *(np.uint32(size) for size in walk.sizes[1:-1])]
    sizes.append(np.uint32(walk.sizes[-1] // wide))
    arguments: list[Any] = [out.data_ptr(), *sizes]
    for operand, strides in zip(operands, walk.strides, strict=True):
        arguments += [operand.data_ptr(), *(np.int32(stride) for stride in strides)]
    blocks = -(-(out.numel() // wide) // _THREADS)
    kernels.launch(function, device, (blocks,), (_THREADS,), tuple(arguments))
    return out


@dataclass(frozen=True)
class Walk:
    """How to go through operands of broadcast shapes, in as few dimensions as possible.

    Attributes:
        shape: of the result.
        sizes: of the ``RANK`` dimensions to walk.
        strides: of every operand along them, 0 where it is broadcast.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def wide(self) -> bool:
        """Whether ``_WIDE`` elements at a time lie side by side, or are the same, in every operand."""
        rows = all(
            strides[-1] == 0 or (strides[-1] == 1 and all(stride % _WIDE == 0 for stride in strides[:-1]))
            for strides in self.strides
        )
        return rows and self.sizes[-1] % _WIDE == 0


def walk_of(shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> Walk | None:
    """The walk for operands of these shapes and strides; None if it takes too many dimensions or elements."""
    shape = tuple(torch.broadcast_shapes(*shapes))
    rank = len(shape)
    if math.prod(shape) >= 1 << 31:
        return None
    steps = []
    for own, given in zip(shapes, strides, strict=True):
        missing = rank - len(own)
        steps.append([0] * missing + [0 if size == 1 else step for size, step in zip(own, given, strict=True)])
    sizes: list[int] = []
    walked: list[list[int]] = [[] for _ in steps]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(row[-1] == step[axis] * size for row, step in zip(walked, steps, strict=True)):
            sizes[-1] *= size  # this dimension continues the one before it in every operand
            for row, step in zip(walked, steps, strict=True):
                row[-1] = step[axis]
            continue
        sizes.append(size)
        for row, step in zip(walked, steps, strict=True):
            row.append(step[axis])
    if len(sizes) > RANK:
        return None
    missing = RANK - len(sizes)
    padded = tuple(tuple([0] * missing + row) for row in walked)
    if any(step >= 1 << 31 for row in padded for step in row):
        return None
    return Walk(shape, tuple([1] * missing + sizes), padded)


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


def code(node: Node, kinds: Sequence[int], wide: int) -> str:
    """The kernel's source.

    Args:
        node: the joined operators.
        kinds: for every operand whether it varies along the last dimension (1) or not (0).
        wide: elements a thread computes.
    """
    names: Sequence[str] = node.get("leaves")
    known = {name: f"v{index}" for index, name in enumerate(names)}
    scalars = node.get("scalars")
    loads, values = [], []
    parameters = ["float* __restrict__ out", "unsigned n", "unsigned d1", "unsigned d2", "unsigned d3"]
    for index, kind in enumerate(kinds):
        parameters += [f"const float* __restrict__ a{index}", *(f"int s{index}{axis}" for axis in range(RANK))]
        step = f" * {wide}" if kind else ""
        walked = " + ".join(f"(long long)i{axis} * s{index}{axis}" for axis in range(RANK - 1))
        at = f"a{index} + {walked} + (long long)(i3{step}) * s{index}3"
        if wide > 1 and kind:
            loads.append(f"const float4 w{index} = *reinterpret_cast<const float4*>({at});")
            loads.append(f"const float l{index}[4] = {{w{index}.x, w{index}.y, w{index}.z, w{index}.w}};")
            values.append(f"const float v{index} = l{index}[k];")
        else:
            loads.append(f"const float l{index} = *({at});")
            values.append(f"const float v{index} = l{index};")
    for index, member in enumerate(node.get("members")):
        operands = [
            "" if not name else known[name] if name in known else literal(scalars[name]) for name in member.inputs
        ]
        values.append(f"const float r{index} = {expression(member, operands)};")
        known[member.outputs[0]] = f"r{index}"
    result = f"r{len(node.get('members')) - 1}"
    store = "reinterpret_cast<float4*>(out)[i] = make_float4(o[0], o[1], o[2], o[3]);" if wide > 1 else "out[i] = o[0];"
    return "\n".join(
        [
            f'extern "C" __global__ void joined({", ".join(parameters)}) {{',
            "  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;",
            "  if (i >= n) return;",
            "  const unsigned i3 = i % d3, q3 = i / d3, i2 = q3 % d2, q2 = q3 / d2, i1 = q2 % d1, i0 = q2 / d1;",
            *(f"  {line}" for line in loads),
            f"  float o[{wide}];",
            "#pragma unroll",
            f"  for (int k = 0; k < {wide}; ++k) {{",
            *(f"    {line}" for line in values),
            f"    o[k] = {result};",
            "  }",
            f"  {store}",
            "}",
        ]
    )


def literal(value: float) -> str:
    """A float32 number as C++ writes it, exactly."""
    single = float(np.float32(value))
    if single in (float("inf"), float("-inf")):
        return f"({'-' if single < 0 else ''}__int_as_float(0x7f800000))"
    if single != single:
        return "__int_as_float(0x7fc00000)"
    return f"({single:.9e}f)"


def expression(member: Draft, operands: Sequence[str]) -> str:
    """An operator as C++ writes it."""
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
