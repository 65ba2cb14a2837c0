"""Engine weights that are elementwise formulas of source weights (a BatchNorm folded into weights and biases).

Weights of one formula are a family, computed by one kernel that is written for it: a refit of a network with hundreds
of folds is a few launches, and each source weight is read where the trainer has it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Layout
from onnx_refit.engine.cuda.family_code import THREADS, WARP, code
from onnx_refit.engine.cuda.gather import upload
from onnx_refit.engine.cuda.lowering.drafts import Draft, drafts_of
from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.cuda.lowering.pointwise import RANK, expression, is_formula, literal, walk_of
from onnx_refit.engine.cuda.plain import STEPS
from onnx_refit.plan.compiled import CompiledModel

HALVES = {torch.float16: 1, torch.bfloat16: 2}
"""The kinds of halves that kernels write."""

NOWHERE = (1 << 64) - 1
"""The place of what is not wanted."""

_LEAVES = 8
_STEPS = 24
_PIECE = 1024  # elements of a warp, all of one line along the last dimension
_VECTOR = 16  # bytes


class Located(Protocol):
    """Where source weights are, on a GPU."""

    @property
    def device(self) -> Any:
        """The GPU."""
        ...

    @property
    def address(self) -> int:
        """Of their addresses there."""
        ...


@dataclass(frozen=True)
class Leaf:
    """A source weight as a formula reads it."""

    source: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Number:
    """A constant of one element."""

    value: float
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Apply:
    """An operator applied to formulas."""

    op_type: str
    operands: tuple[Formula | None, ...]
    shape: tuple[int, ...]
    draft: Draft = field(compare=False)


Formula = Leaf | Number | Apply


def formulas(compiled: CompiledModel) -> dict[str, Formula]:
    """Engine weight name -> its formula, for those computed weights that are one (in float32)."""
    program = compiled.program
    if program.model is None:
        return {}
    graph = program.model.graph
    known: dict[str, Formula | None] = {}
    for source in compiled.sources:
        spec = source.spec
        if spec.dtype == "float32":
            shape = spec.static_shape
            known[spec.name] = Leaf(spec.name, shape, tuple(torch.empty(shape, device="meta").stride()))
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, value in values.items():
        if value.size == 1 and value.dtype == np.float32:
            known[name] = Number(float(value.reshape(())), value.shape)
    for draft in drafts_of(graph):
        if len(draft.outputs) == 1:
            known[draft.outputs[0]] = _applied(draft, known, values)
    engine = {spec.name: spec for spec in compiled.engine_weights}
    found: dict[str, Formula] = {}
    for value_info in graph.output:
        formula, wanted = known.get(value_info.name), engine.get(value_info.name)
        if formula is None or wanted is None or isinstance(formula, Number) or wanted.dtype != "float32":
            continue
        if formula.shape == wanted.static_shape and len(_leaves(formula)) <= _LEAVES and _size(formula) <= _STEPS:
            found[value_info.name] = formula
    return found


def _applied(draft: Draft, known: Mapping[str, Formula | None], values: Mapping[str, Any]) -> Formula | None:
    operands = [known.get(name) if name else None for name in draft.inputs]
    if is_formula(draft):
        if any(name and operand is None for name, operand in zip(draft.inputs, operands, strict=True)):
            return None
        shape = torch.broadcast_shapes(*(operand.shape for operand in operands if operand is not None))
        return Apply(draft.op_type, tuple(operands), tuple(shape), draft)
    if draft.op_type in STEPS and operands and operands[0] is not None:
        if any(name not in values for name in draft.inputs[1:]):
            return None
        arguments = [[int(v) for v in values[name].reshape(-1)] for name in draft.inputs[1:]]
        return _viewed(operands[0], draft, arguments)
    return None


def _viewed(formula: Formula, draft: Draft, arguments: list[list[int]]) -> Formula | None:
    """A formula transposed or reshaped: each leaf is, if it has the formula's own shape."""
    if isinstance(formula, Number):
        return Number(formula.value) if len(formula.shape) <= 1 else None
    if isinstance(formula, Leaf):
        tensor = torch.empty_strided(formula.shape, formula.strides, device="meta")
        try:
            view = STEPS[draft.op_type](tensor, draft.attributes, arguments)
        except (RuntimeError, ValueError, IndexError):
            return None
        return Leaf(formula.source, tuple(view.shape), tuple(view.stride()))
    operands: list[Formula | None] = []
    shape = formula.shape
    for operand in formula.operands:
        if operand is None or (isinstance(operand, Number) and len(operand.shape) <= 1):
            operands.append(None if operand is None else Number(operand.value))
            continue
        view_of_it = _viewed(operand, draft, arguments) if operand.shape == formula.shape else None
        if view_of_it is None:
            return None
        operands.append(view_of_it)
        shape = view_of_it.shape
    return Apply(formula.op_type, tuple(operands), shape, formula.draft)


def sources_of(found: Mapping[str, Formula]) -> list[str]:
    """The source weights that formulas read."""
    return list(dict.fromkeys(leaf.source for formula in found.values() for leaf in _leaves(formula)))


def _leaves(formula: Formula | None) -> list[Leaf]:
    if isinstance(formula, Leaf):
        return [formula]
    if not isinstance(formula, Apply):
        return []
    return list(dict.fromkeys(leaf for operand in formula.operands for leaf in _leaves(operand)))


def _size(formula: Formula | None) -> int:
    return 1 + sum(_size(operand) for operand in formula.operands) if isinstance(formula, Apply) else 0


def body(formula: Formula) -> tuple[list[str], list[Leaf]]:
    """The statements that compute an element as ``result`` from ``v0``, ``v1``, ..., and what these are."""
    leaves = _leaves(formula)
    lines: list[str] = []
    names: dict[Formula, str] = {leaf: f"v{index}" for index, leaf in enumerate(leaves)}

    def write(part: Formula | None) -> str:
        if part is None:
            return ""
        if isinstance(part, Number):
            return literal(part.value)
        if part not in names:
            text = expression(part.draft, [write(operand) for operand in part.operands])  # type: ignore[union-attr]
            names[part] = f"r{len(lines)}"
            lines.append(f"const float r{len(lines)} = {text};")
        return names[part]

    lines.append(f"const float result = {write(formula)};")
    return lines, leaves


@dataclass(frozen=True)
class Member:
    """One weight of a family.

    Attributes:
        leaves: what it reads.
        to: where it goes, bytes from the storage's beginning.
        keep: where the leaf that the family takes goes too, bytes from the beginning of what is kept; or NOWHERE.
    """

    leaves: Sequence[Leaf]
    to: int
    keep: int = NOWHERE


class Family:
    """Engine weights of one formula.

    Args:
        lines: its statements, see ``body``.
        members: the weights.
        table: where the source weights are.
        index: source weight name -> its place in the table.
        half: the kind of halves that it writes; 0 for float32.
        taken: which leaf is looked at for NaN and infinities, and kept, as it is read; None where none is. It has the
            weight's own elements in their order.

    Attributes:
        elements: of all weights.
    """

    def __init__(
        self,
        lines: Sequence[str],
        members: Sequence[Member],
        table: Located,
        index: Mapping[str, int],
        half: int = 0,
        taken: int | None = None,
    ) -> None:
        self._table = table
        count = len(members[0].leaves)
        row_type = np.dtype(
            [
                ("to", "<u8"),
                ("keep", "<u8"),
                ("sizes", "<u4", RANK),
                ("leaf", "<u4", count),
                ("s", "<i4", (count, RANK)),
                ("wide", "<u4"),
            ]
        )
        rows, pieces, deepest = np.zeros(len(members), row_type), [], 1
        varies = [False] * count
        for row, one in enumerate(members):
            leaves, to = one.leaves, one.to
            walk = walk_of([leaf.shape for leaf in leaves], [leaf.strides for leaf in leaves])
            if walk is None:
                raise ValueError("too many dimensions")
            wide = walk.wide and to % _VECTOR == 0
            rows[row] = (to, one.keep, walk.sizes, [index[leaf.source] for leaf in leaves], walk.strides, wide)
            varies = [one or strides[-1] != 0 for one, strides in zip(varies, walk.strides, strict=True)]
            deepest = max(deepest, sum(size > 1 for size in walk.sizes))
            lines_of_it, width = int(np.prod(walk.sizes[:-1])), walk.sizes[-1]
            pieces += [
                (row, line, begin, min(_PIECE, width - begin))
                for line in range(lines_of_it)
                for begin in range(0, width, _PIECE)
            ]
        self._count = len(pieces)
        self._members = upload(rows, table.device)
        self._pieces = upload(np.array(pieces, np.uint32), table.device)
        text = code(lines, varies, deepest, half, taken)
        self._kernel = kernels.compiled(text, "family", table.device.index, fused=False)
        self.elements = sum(math.prod(row["sizes"].tolist()) for row in rows)
        self._grid = -(-self._count // (THREADS // WARP))
        self._tables = (self._members.data_ptr(), self._pieces.data_ptr())

    def prepared(self, found: int) -> kernels.Prepared:
        """The kernel; it takes what is added to the table's addresses, and where weights and what is kept go.

        Args:
            found: the address where an element that is not finite is noted, as a 32-bit word.
        """
        fixed = (self._table.address, *self._tables, self._count, found)
        return kernels.Prepared(self._kernel, self._table.device, self._grid, THREADS, fixed, 3)

    def enqueue(self, storage: Tensor) -> None:
        """Compute the weights from the tensors noted last."""
        arguments = (self._table.address, *self._tables, self._count, 0, 0, storage.data_ptr(), 0)
        kernels.launch(self._kernel, self._table.device, (self._grid,), (THREADS,), arguments)


def families(
    found: Mapping[str, Formula],
    places: Mapping[str, int],
    table: Located,
    index: Mapping[str, int],
    half: int = 0,
    takes: Mapping[str, int] | None = None,
) -> tuple[list[Family], frozenset[str]]:
    """The families of these formulas, and the source weights that they take as they read them.

    Args:
        found: engine weight name -> formula.
        places: engine weight name -> bytes from the storage's beginning.
        table: where the source weights are.
        index: source weight name -> its place in the table.
        half: the kind of halves that weights are stored in; 0 for float32.
        takes: source weights that are to be looked at and kept by whoever reads them first -> where they are kept.
    """
    left = dict(takes or {})
    taken: set[str] = set()
    groups: dict[tuple[tuple[str, ...], int | None], list[Member]] = {}
    for name, formula in found.items():
        lines, leaves = body(formula)
        place = next((i for i, leaf in enumerate(leaves) if leaf.source in left and _whole(leaf, formula)), None)
        keep = NOWHERE if place is None else left.pop(leaves[place].source)
        if place is not None:
            taken.add(leaves[place].source)
        groups.setdefault((tuple(lines), place), []).append(Member(leaves, places[name], keep))
    made = [Family(lines, members, table, index, half, place) for (lines, place), members in groups.items()]
    return made, frozenset(taken)


def half_of(layout: Layout, names: Collection[str]) -> int:
    """The kind of halves that computed weights are stored in; 0 for float32."""
    return next((HALVES.get(layout.slots[name].dtype, 0) for name in names), 0)


def _whole(leaf: Leaf, formula: Formula) -> bool:
    """Whether a formula reads each element of a large leaf once, in the order in which it writes."""
    if isinstance(formula, Number) or leaf.shape != formula.shape or np.prod(leaf.shape) < _PIECE:
        return False
    return leaf.strides == tuple(torch.empty(leaf.shape, device="meta").stride()) and leaf.shape[-1] > 0
