"""Products with weights: biases and activations taken in, products of one operand made one, and each form timed.

cuBLAS chooses kernels by heuristics, which for a few rows are off by factors; and a bias or a sum along K may be
cheaper inside or outside of it. So a recording times the ways to compute each product of its shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from onnx_refit.engine.cuda.lowering import tuning
from onnx_refit.engine.cuda.lowering.drafts import Draft, Flow
from onnx_refit.engine.cuda.lowering.operators import Node, Tensor, operator

Shapes = Mapping[str, tuple[int, ...]]

_FEW_ROWS = 512
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Sum", "Clip"}


@dataclass(frozen=True)
class Products:
    """The graph with products put together.

    Attributes:
        drafts: the nodes.
        together: weights that should lie side by side, see ``Layout``.
    """

    drafts: list[Draft]
    together: tuple[tuple[str, ...], ...]


def take_in_biases(drafts: Sequence[Draft], outputs: Sequence[str], weights: Shapes) -> list[Draft]:
    """Products with a weight as ``_Linear``, a bias and a Relu taken in.

    A bias that another elementwise operator follows stays outside: it costs nothing in that one's kernel.

    Args:
        drafts: the nodes in order.
        outputs: the graph's outputs.
        weights: weight name -> shape.
    """
    flow = Flow(drafts, outputs)
    gone: set[str] = set()
    made: list[Draft] = []
    for draft in drafts:
        if draft.outputs[0] in gone:
            continue
        found = _linear(draft, weights)
        if found is None:
            made.append(draft)
            continue
        linear, bias = found
        if bias is None:
            add = flow.only_reader(linear.outputs[0])
            bias = _bias_of(add, linear.outputs[0], _columns(linear, weights), weights)
            if bias is None or add is None or not _worth_inside(flow.only_reader(add.outputs[0])):
                made.append(linear)
                continue
            gone.add(add.outputs[0])
            linear = replace(linear, inputs=(*linear.inputs, bias), outputs=add.outputs)
        elif not _worth_inside(flow.only_reader(linear.outputs[0])):
            inner = linear.outputs[0] + " before its bias"
            made.append(replace(linear, outputs=(inner,)))
            made.append(Draft("Add", linear.name + " bias", (inner, bias), linear.outputs))
            continue
        else:
            linear = replace(linear, inputs=(*linear.inputs, bias))
        after = flow.only_reader(linear.outputs[0])
        if after is not None and after.op_type == "Relu":
            gone.add(after.outputs[0])
            linear = replace(linear, outputs=after.outputs, attributes={**linear.attributes, "relu": 1})
        made.append(linear)
    return made


def _linear(draft: Draft, weights: Shapes) -> tuple[Draft, str | None] | None:
    """A product with a matrix of weights as ``_Linear``, and its bias if it has one."""
    if len(draft.inputs) < 2 or len(weights.get(draft.inputs[1], ())) != 2 or draft.inputs[0] in weights:
        return None
    given = draft.attributes
    if draft.op_type == "MatMul":
        return replace(draft, op_type="_Linear", attributes={}), None
    if draft.op_type != "Gemm" or given.get("transA", 0) or given.get("alpha", 1.0) != 1:
        return None
    bias = draft.inputs[2] if len(draft.inputs) > 2 else ""
    transposed = given.get("transB", 0)
    columns = weights[draft.inputs[1]][0 if transposed else 1]
    if bias and (given.get("beta", 1.0) != 1 or weights.get(bias) != (columns,)):
        return None
    linear = replace(draft, op_type="_Linear", inputs=draft.inputs[:2], attributes={"transposed": transposed})
    return linear, bias or None


def _columns(linear: Draft, weights: Shapes) -> int:
    return weights[linear.inputs[1]][0 if linear.attributes.get("transposed") else 1]


def _bias_of(add: Draft | None, product: str, columns: int, weights: Shapes) -> str | None:
    if add is None or add.op_type != "Add" or len(add.inputs) != 2:
        return None
    other = add.inputs[1] if add.inputs[0] == product else add.inputs[0]
    return other if weights.get(other) == (columns,) else None


def _worth_inside(reader: Draft | None) -> bool:
    return reader is None or reader.op_type == "Relu" or reader.op_type not in _ELEMENTWISE


def merge(drafts: Sequence[Draft], weights: Shapes) -> Products:
    """Products of one operand with several weights as one product (queries, keys and values)."""
    groups: dict[tuple[Any, ...], list[Draft]] = {}
    for draft in drafts:
        if draft.op_type == "_Linear" and not draft.attributes.get("relu"):
            key = (draft.inputs[0], len(draft.inputs), draft.attributes.get("transposed", 0))
            groups.setdefault(key, []).append(draft)
    several = [group for group in groups.values() if len(group) > 1 and _distinct(group)]
    first = {group[0].outputs[0]: group for group in several}
    others = {draft.outputs[0] for group in several for draft in group[1:]}
    made, together = [], []
    for draft in drafts:
        group = first.get(draft.outputs[0], [])
        if group:
            matrices = tuple(member.inputs[1] for member in group)
            biases = tuple(member.inputs[2] for member in group if len(member.inputs) > 2)
            outputs = tuple(member.outputs[0] for member in group)
            attributes = {**draft.attributes, "count": len(group)}
            made.append(Draft("_Linears", draft.name, (draft.inputs[0], *matrices, *biases), outputs, attributes))
            together += [matrices] + ([biases] if biases else [])
        elif draft.outputs[0] not in others:
            made.append(draft)
    return Products(made, tuple(together))


def _distinct(group: Sequence[Draft]) -> bool:
    names = [name for draft in group for name in draft.inputs[1:]]
    return len(set(names)) == len(names)


def scale(drafts: Sequence[Draft], outputs: Sequence[str], hosted: set[str]) -> list[Draft]:
    """Products of operands that are scaled by a number as one product with that factor (attention)."""
    flow = Flow(drafts, outputs)
    gone: set[str] = set()
    made: list[Draft] = []
    for draft in drafts:
        if draft.op_type != "MatMul":
            made.append(draft)
            continue
        operands, factors, places = [], [], []
        for place, name in enumerate(draft.inputs):
            scaled = flow.makers.get(name)
            factor = _factor(scaled, hosted) if flow.only_reader(name) is draft else None
            if scaled is not None and factor is not None:
                gone.add(name)
                factors.append(factor)
                places.append(place)
                operands.append(next(other for other in scaled.inputs if other != factor))
            else:
                operands.append(name)
        inputs = (*operands, *factors)
        scaled_draft = replace(draft, op_type="_ScaledMatMul", inputs=inputs, attributes={"places": tuple(places)})
        made.append(scaled_draft if factors else draft)
    return [draft for draft in made if draft.outputs[0] not in gone]


def _factor(draft: Draft | None, hosted: set[str]) -> str | None:
    if draft is None or draft.op_type != "Mul" or len(set(draft.inputs)) != 2:
        return None
    numbers = [name for name in draft.inputs if name in hosted]
    return numbers[0] if len(numbers) == 1 else None


# ---------------------------------------------------------------------- how they run


@operator("_Linear")
def linear(node: Node, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ w + bias`` over the last axis, then Relu if the node says so."""
    matrix = w.t() if node.get("transposed", 0) else w
    return product(x, matrix, bias, relu=bool(node.get("relu", 0)))


@operator("_Linears")
def linears(node: Node, x: Tensor, *weights: Tensor) -> Any:
    """Several products of ``x``; one where the weights lie side by side."""
    count = node.get("count")
    matrices = [w.t() if node.get("transposed", 0) else w for w in weights[:count]]
    biases = weights[count:]
    rows = side_by_side([matrix.t() for matrix in matrices])
    bias = side_by_side([b.unsqueeze(1) for b in biases]) if biases else None
    if rows is None or (biases and bias is None):
        return tuple(product(x, m, biases[i] if biases else None) for i, m in enumerate(matrices))
    whole = product(x, rows.t(), None if bias is None else bias.squeeze(1))
    return tuple(whole.split([matrix.shape[1] for matrix in matrices], -1))


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices of one width as one, if each begins where the one before it ends; None otherwise."""
    first = parts[0]
    if any(not part.is_contiguous() or part.shape[1] != first.shape[1] for part in parts):
        return None
    for part, after in itertools.pairwise(parts):
        same = part.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        if not same or part.storage_offset() + part.numel() != after.storage_offset():
            return None
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), first.stride())


@operator("_ScaledMatMul", host=(2, 3))
def scaled_matmul(node: Node, a: Tensor, b: Tensor, *factors: Tensor) -> Tensor:
    """``a @ b`` times numbers."""
    if any(factor.numel() != 1 for factor in factors):  # not a number after all
        operands = [a, b]
        for factor, place in zip(factors, node.get("places"), strict=True):
            operands[place] = operands[place] * _written_there(factor, a)
        return operands[0] @ operands[1]
    alpha = 1.0
    for factor in factors:
        alpha *= factor.item()
    if a.dim() < 3 or a.shape[:-2] != b.shape[:-2]:
        return (a @ b) * alpha
    flat_a, flat_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    empty = torch.empty((), dtype=a.dtype, device=a.device).expand(flat_a.shape[0], a.shape[-2], b.shape[-1])
    return torch.baddbmm(empty, flat_a, flat_b, beta=0, alpha=alpha).reshape(*a.shape[:-1], b.shape[-1])


def _written_there(values: Tensor, like: Tensor) -> Tensor:
    """Numbers of the host on a device, written by kernels: a recording cannot hold a copy from the host."""
    each = [torch.full((), value, dtype=like.dtype, device=like.device) for value in values.reshape(-1).tolist()]
    return torch.stack(each).reshape(values.shape)


def product(x: Tensor, w: Tensor, bias: Tensor | None = None, *, relu: bool = False, dense: bool = False) -> Tensor:
    """``x [..., K] @ w [K, N] + bias [N]``, by the way that was fastest for these shapes.

    Args:
        x: the operand.
        w: the matrix, in any order.
        bias: added to every row.
        relu: whether Relu follows.
        dense: whether the result must be contiguous; only that of a matrix may else be transposed.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    dense = dense or x.dim() != 2
    ways = _ways(rows, w, bias, relu=relu, dense=dense)
    key = ("product", *rows.shape, *w.shape, w.stride(), bias is None, relu, rows.dtype, rows.stride(), dense)
    result = tuning.fastest(key, ways, rows)
    return result if x.dim() == 2 else result.reshape(*x.shape[:-1], w.shape[1])


def _ways(x: Tensor, w: Tensor, bias: Tensor | None, *, relu: bool, dense: bool) -> dict[str, Callable[[], Tensor]]:
    def finish(y: Tensor, added: bool) -> Tensor:
        y = y if added or bias is None else y + bias
        return functional.relu(y) if relu else y

    def split(parts: int) -> Tensor:
        halves = torch.bmm(x.unflatten(1, (parts, -1)).transpose(0, 1), w.unflatten(0, (parts, -1)))
        return finish(halves.sum(0), False)

    ways: dict[str, Callable[[], Tensor]] = {}
    if bias is None:
        ways["plain"] = lambda: finish(torch.mm(x, w), True)
    else:
        ways["bias inside"] = lambda: finish(torch.addmm(bias, x, w), True)
        ways["bias outside"] = lambda: finish(torch.mm(x, w), False)
        if relu and x.is_cuda:
            ways["bias and activation inside"] = lambda: torch._addmm_activation(bias, x, w)
    if x.is_cuda and 1 < x.shape[0] <= _FEW_ROWS:
        if dense:
            ways["turned"] = lambda: finish(torch.mm(w.t(), x.t()).t(), False).contiguous()
        else:
            ways["turned"] = lambda: finish(torch.mm(w.t(), x.t()).t(), False)
        for parts in (2, 4, 8):
            if x.shape[1] % parts == 0 and x.shape[1] // parts >= 128:
                ways[f"in {parts} parts"] = lambda parts=parts: split(parts)  # type: ignore[misc]
    return ways
