"""Engine weights that are elementwise formulas of source weights (a BatchNorm folded into weights and biases).

Weights of one formula are a family, computed by one kernel that is written for it: a refit of a network with hundreds
of folds is a few launches, and each source weight is read where the trainer has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.gather import Table, upload
from onnx_refit.engine.cuda.lowering.drafts import Draft, drafts_of
from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.cuda.lowering.pointwise import RANK, expression, is_formula, literal, walk_of
from onnx_refit.engine.cuda.plain import STEPS
from onnx_refit.plan.compiled import CompiledModel

_LEAVES = 8
_STEPS = 24
_PIECE = 1024  # elements of a warp, all of one line along the last dimension
_THREADS = 256
_WARP = 32
_VECTOR = 16  # bytes


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


class Family:
    """Engine weights of one formula.

    Args:
        lines: its statements, see ``body``.
        members: for each weight what it reads and where it goes: leaves, and bytes from the storage's beginning.
        table: where the source weights are.
        index: source weight name -> its place in the table.
    """

    def __init__(
        self,
        lines: Sequence[str],
        members: Sequence[tuple[Sequence[Leaf], int]],
        table: Table,
        index: Mapping[str, int],
    ) -> None:
        self._table = table
        count = len(members[0][0])
        member = np.dtype(
            [
                ("to", "<u8"),
                ("sizes", "<u4", RANK),
                ("leaf", "<u4", count),
                ("s", "<i4", (count, RANK)),
                ("wide", "<u4"),
            ]
        )
        rows, pieces, deepest = np.zeros(len(members), member), [], 1
        varies = [False] * count
        for row, (leaves, to) in enumerate(members):
            walk = walk_of([leaf.shape for leaf in leaves], [leaf.strides for leaf in leaves])
            if walk is None:
                raise ValueError("too many dimensions")
            wide = walk.wide and to % _VECTOR == 0
            rows[row] = (to, walk.sizes, [index[leaf.source] for leaf in leaves], walk.strides, wide)
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
        self._kernel = kernels.compiled(code(lines, varies, deepest), "family", table.device.index, fused=False)

    def enqueue(self, storage: Tensor) -> None:
        """Compute the weights from the tensors noted last."""
        arguments = (self._table.address, self._members.data_ptr(), self._pieces.data_ptr(), storage.data_ptr())
        blocks = -(-self._count // (_THREADS // _WARP))
        kernels.launch(self._kernel, self._table.device, (blocks,), (_THREADS,), (*arguments, np.uint32(self._count)))


def families(
    found: Mapping[str, Formula], places: Mapping[str, int], table: Table, index: Mapping[str, int]
) -> list[Family]:
    """The families of these formulas.

    Args:
        found: engine weight name -> formula.
        places: engine weight name -> bytes from the storage's beginning.
        table: where the source weights are.
        index: source weight name -> its place in the table.
    """
    groups: dict[tuple[str, ...], list[tuple[Sequence[Leaf], int]]] = {}
    for name, formula in found.items():
        lines, leaves = body(formula)
        groups.setdefault(tuple(lines), []).append((leaves, places[name]))
    return [Family(lines, members, table, index) for lines, members in groups.items()]


def code(lines: Sequence[str], varies: Sequence[bool], rank: int) -> str:
    """The kernel's source.

    Args:
        lines: the formula's statements.
        varies: for every leaf, whether it varies along a line in some member.
        rank: dimensions of any size in any member; the walk's last ones.
    """
    names = [f"i{axis}" for axis in range(RANK - rank, RANK)]
    walk, left = [], "p.line"
    for axis in range(RANK - 2, RANK - rank, -1):
        walk.append(f"const unsigned i{axis} = {left} % m.sizes[{axis}], q{axis} = {left} / m.sizes[{axis}];")
        left = f"q{axis}"
    if rank > 1:
        walk.append(f"const unsigned {names[0]} = {left};")
    count = len(varies)
    moving = [index for index, varying in enumerate(varies) if varying]
    pointers = []
    for index in range(count):
        at = " + ".join(f"(long long){name} * m.s[{index}][{name[1:]}]" for name in names[:-1])
        pointers.append(f"reinterpret_cast<const float*>(sources[m.leaf[{index}]]) + {at or 0}")
    words = 3 + RANK + count * (RANK + 1)  # of a member
    return "\n".join(
        [
            # Four elements side by side, or one for all four.
            "__device__ __forceinline__ float4 load4(const float* from, unsigned i, int step) {",
            "  if (step) return __ldg(reinterpret_cast<const float4*>(from + i));",
            "  const float one = __ldg(from);",
            "  return make_float4(one, one, one, one);",
            "}",
            f"struct Member {{ unsigned sizes[{RANK}], leaf[{count}]; int s[{count}][{RANK}]; }};",
            "struct Piece { unsigned member, line, begin, count; };",
            'extern "C" __global__ __launch_bounds__(256) void family(',
            "    const unsigned long long* __restrict__ sources, const unsigned* __restrict__ members,",
            "    const Piece* __restrict__ pieces, unsigned char* __restrict__ out, unsigned n) {",
            f"  const unsigned own = blockIdx.x * {_THREADS // _WARP} + threadIdx.x / {_WARP};",
            f"  const unsigned lane = threadIdx.x % {_WARP};",
            "  if (own >= n) return;",
            "  const Piece p = pieces[own];",
            "  Member m;",
            f"  const unsigned* from = members + p.member * {words};",
            "  const unsigned long long at = from[0] | ((unsigned long long)from[1] << 32);",
            f"  for (int k = 0; k < {RANK}; ++k) m.sizes[k] = from[2 + k];",
            f"  for (int k = 0; k < {count}; ++k) m.leaf[k] = from[{2 + RANK} + k];",
            f"  for (int k = 0; k < {count * RANK}; ++k) (&m.s[0][0])[k] = (int)from[{2 + RANK + count} + k];",
            f"  float* to = reinterpret_cast<float*>(out + at) + (unsigned long long)p.line * m.sizes[{RANK - 1}];",
            *(f"  {line}" for line in walk),
            *(f"  const float* f{index} = {pointer};" for index, pointer in enumerate(pointers)),
            # What does not vary along a line is computed once: the compiler sees that.
            *(f"  const float v{index} = __ldg(f{index});" for index, varying in enumerate(varies) if not varying),
            "  const unsigned end = p.begin + p.count;",
            f"  if (from[{words - 1}]) {{",
            "#pragma unroll 2",
            f"    for (unsigned i = p.begin + 4 * lane; i < end; i += {4 * _WARP}) {{",
            *(f"      const float4 w{k} = load4(f{k}, i, m.s[{k}][{RANK - 1}]);" for k in moving),
            *(f"      const float l{k}[4] = {{w{k}.x, w{k}.y, w{k}.z, w{k}.w}};" for k in moving),
            "      float o[4];",
            "#pragma unroll",
            "      for (int k = 0; k < 4; ++k) {",
            *(f"        const float v{k} = l{k}[k];" for k in moving),
            *(f"        {line}" for line in lines),
            "        o[k] = result;",
            "      }",
            "      *reinterpret_cast<float4*>(to + i) = make_float4(o[0], o[1], o[2], o[3]);",
            "    }",
            "    return;",
            "  }",
            "#pragma unroll 4",
            f"  for (unsigned i = p.begin + lane; i < end; i += {_WARP}) {{",
            *(f"    const float v{k} = __ldg(f{k} + (long long)i * m.s[{k}][{RANK - 1}]);" for k in moving),
            *(f"    {line}" for line in lines),
            "    to[i] = result;",
            "  }",
            "}",
        ]
    )
