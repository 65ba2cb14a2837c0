"""Read a refit program as recipes: which engine weights only rearrange, or scale, source weights, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto

from onnx_refit.model.graph import attribute
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.trace.affine import Order, through
from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk, c_strides, whole
from onnx_refit.tensors import TensorSpec, onnx_dtype_name

_FEW = 64  # elements; smaller products are computed with the rest of the program
_SMALL = 4096  # elements; larger constants are hidden from shape inference
_MOST_PARTS = 256
_SCALED = frozenset({"float32", "float64"})


@dataclass(frozen=True)
class Lowered:
    """A refit program as recipes.

    Attributes:
        recipes: engine weight -> recipe over source weights and computed values.
        computed: values of the program's graph that must be computed, with their specs.
    """

    recipes: Mapping[str, Recipe]
    computed: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class _Axis:
    """One axis of a value as walks: (extent, stride of each operand), outer first."""

    cuts: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def extent(self) -> int:
        return math.prod(extent for extent, _ in self.cuts)


@dataclass(frozen=True)
class _Box:
    """A value read from its operands along strides: one operand, or the product of two."""

    axes: tuple[_Axis, ...]
    operands: tuple[tuple[str, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.extent for axis in self.axes)


@dataclass(frozen=True)
class _Mosaic:
    """A value put together from boxes that overlap nowhere and leave nothing out.

    Attributes:
        shape: the value's shape.
        parts: (where the box begins on each axis, box).
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], _Box], ...]

    @staticmethod
    def of(box: _Box) -> _Mosaic:
        return _Mosaic(box.shape, (((0,) * len(box.axes), box),))


def lower(compiled: CompiledModel) -> Lowered:
    """The refit program of a compiled model as recipes."""
    engine = {spec.name: spec for spec in compiled.engine_weights}
    recipes = {name: whole(engine[name], source) for name, source in compiled.program.passthrough.items()}
    if compiled.program.model is None:
        return Lowered(recipes, {})
    reader = _Reader(compiled.program.model, compiled)
    for name in engine:
        if name not in recipes:
            recipes[name] = reader.recipe(engine[name])
    read = {source for recipe in recipes.values() for source in recipe.sources}
    return Lowered(recipes, reader.specs(read - {source.spec.name for source in compiled.sources}))


class _Reader:
    def __init__(self, model: onnx.ModelProto, compiled: CompiledModel) -> None:
        self._specs: dict[str, TensorSpec] = {source.spec.name: source.spec for source in compiled.sources}
        inferred = model
        declared = {value.name for value in (*model.graph.value_info, *model.graph.output)}
        if not all(output in declared for node in model.graph.node for output in node.output if output):
            inferred = onnx.shape_inference.infer_shapes(_without_large(model), data_prop=True)
        for value in (*inferred.graph.value_info, *inferred.graph.output):
            tensor = value.type.tensor_type
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
                shape = tuple(int(d.dim_value) for d in tensor.shape.dim)
                self._specs[value.name] = TensorSpec(value.name, onnx_dtype_name(tensor.elem_type), shape)
        self._producers = {output: node for node in model.graph.node for output in node.output if output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sources = {source.spec.name for source in compiled.sources}
        self._known: dict[str, _Mosaic] = {}

    def specs(self, names: Iterable[str]) -> dict[str, TensorSpec]:
        """The specs of values of the program, in the order of their names."""
        return {name: self._specs[name] for name in sorted(names)}

    def recipe(self, spec: TensorSpec) -> Recipe:
        """The recipe of an engine weight that the program computes."""
        strides = c_strides(spec.static_shape)
        pieces = []
        for starts, box in self._value(spec.name).parts:
            offset = sum(start * stride for start, stride in zip(starts, strides, strict=True))
            pieces.append(_piece(box, offset, strides))
        return Recipe(spec, tuple(pieces))

    def _value(self, name: str) -> _Mosaic:
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def _read(self, name: str) -> _Mosaic:
        node = self._producers.get(name)
        if node is None or name not in self._specs:
            return _Mosaic.of(self._plain(name))
        rule = _RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
        try:
            found = rule(self, node, name) if rule is not None else None
        except _UnknownShapeError:
            found = None
        if found is None:
            return _Mosaic.of(self._plain(name))
        return _Mosaic.of(found) if isinstance(found, _Box) else found

    def _plain(self, name: str) -> _Box:
        """A value as it is: a source weight, or something to compute."""
        spec = self._specs.get(name)
        if spec is None:
            raise _UnknownShapeError(name)
        shape = spec.static_shape
        axes = tuple(_Axis(((e, (s,)),)) for e, s in zip(shape, c_strides(shape), strict=True))
        return _Box(axes, ((name, 0),))

    def _mosaic(self, name: str) -> _Mosaic | None:
        return None if name in self._constants else self._value(name)

    def _box(self, name: str) -> _Box | None:
        value = self._mosaic(name)
        return value.parts[0][1] if value is not None and len(value.parts) == 1 else None

    def _ints(self, name: str) -> list[int] | None:
        tensor = self._constants.get(name)
        return None if tensor is None else [int(x) for x in onnx.numpy_helper.to_array(tensor).reshape(-1)]

    def reshaped(self, node: NodeProto, name: str) -> _Mosaic | None:
        """Reshape, Squeeze, Unsqueeze, Flatten, Identity: another shape over the same order."""
        shape = self._specs[name].static_shape
        value = self._mosaic(node.input[0])
        if value is None:
            return None
        if len(value.parts) > 1:
            return _with_ones(value, shape)
        box = _reshape(value.parts[0][1], shape)
        return None if box is None else _Mosaic.of(box)

    def transposed(self, node: NodeProto, name: str) -> _Mosaic | None:
        """Transpose: the axes in another order."""
        value = self._mosaic(node.input[0])
        if value is None:
            return None
        order = attribute(node, "perm") or list(reversed(range(len(value.shape))))
        assert isinstance(order, Sequence)
        parts = tuple(
            (tuple(starts[k] for k in order), _Box(tuple(box.axes[k] for k in order), box.operands))
            for starts, box in value.parts
        )
        return _Mosaic(tuple(value.shape[k] for k in order), parts)

    def split(self, node: NodeProto, name: str) -> _Box | None:
        """Split: a range of one axis."""
        box = self._box(node.input[0])
        if box is None or any(output not in self._specs for output in node.output):
            return None
        axis = int(attribute(node, "axis", 0)) % len(box.axes)  # type: ignore[call-overload]
        position = list(node.output).index(name)
        begin = sum(self._specs[output].static_shape[axis] for output in list(node.output)[:position])
        return _range(box, axis, begin, 1, self._specs[name].static_shape[axis])

    def sliced(self, node: NodeProto, name: str) -> _Box | None:
        """Slice: ranges of axes, with steps."""
        box = self._box(node.input[0])
        bounds = [self._ints(input_name) for input_name in node.input[1:]]
        if box is None or len(bounds) < 2 or any(b is None for b in bounds):
            return None
        starts, ends = bounds[0] or [], bounds[1] or []
        axes = (bounds[2] if len(bounds) > 2 else None) or list(range(len(starts)))
        steps = (bounds[3] if len(bounds) > 3 else None) or [1] * len(starts)
        result: _Box | None = box
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if result is None or not step:
                return None
            extent = result.shape[axis]
            chosen = range(*slice(start, end, step).indices(extent))
            result = _range(result, axis % len(result.axes), chosen.start, step, len(chosen))
        if result is None or result.shape != self._specs[name].static_shape:
            return None
        return result

    def stacked(self, node: NodeProto, name: str) -> _Mosaic | None:
        """Concat."""
        shape = self._specs[name].static_shape
        axis = int(attribute(node, "axis", 0)) % len(shape)  # type: ignore[call-overload]
        parts: list[tuple[tuple[int, ...], _Box]] = []
        begin = 0
        for value in (self._mosaic(part) for part in node.input):
            if value is None or len(parts) + len(value.parts) > _MOST_PARTS:
                return None
            for starts, box in value.parts:
                parts.append(((*starts[:axis], starts[axis] + begin, *starts[axis + 1 :]), box))
            begin += value.shape[axis]
        return _Mosaic(shape, tuple(parts))

    def product(self, node: NodeProto, name: str) -> _Box | None:
        """Mul of a large tensor by a broadcast one: one multiplication straight into the engine's layout."""
        spec = self._specs[name]
        if spec.size < _FEW or spec.dtype not in _SCALED:
            return None
        boxes = [self._box(part) for part in node.input]
        spread = [_broadcast(box, spec.static_shape) for box in boxes if box is not None and len(box.operands) == 1]
        if len(spread) != 2 or spread[0] is None or spread[1] is None:
            return None
        return _paired(spread[0], spread[1])


class _UnknownShapeError(Exception):
    """A value of the program whose shape is not inferred: its readers are computed."""


_RULES = {
    "Reshape": _Reader.reshaped,
    "Squeeze": _Reader.reshaped,
    "Unsqueeze": _Reader.reshaped,
    "Flatten": _Reader.reshaped,
    "Identity": _Reader.reshaped,
    "Transpose": _Reader.transposed,
    "Split": _Reader.split,
    "Slice": _Reader.sliced,
    "Concat": _Reader.stacked,
    "Mul": _Reader.product,
}


def _piece(box: _Box, offset: int, strides: tuple[int, ...]) -> Piece:
    dims, target = [], []
    walks: list[list[int]] = [[] for _ in box.operands]
    for axis, stride in zip(box.axes, strides, strict=True):
        extents = tuple(extent for extent, _ in axis.cuts)
        for (extent, reads), step in zip(axis.cuts, c_strides(extents), strict=True):
            dims.append(extent)
            target.append(stride * step)
            for walk, read in zip(walks, reads, strict=True):
                walk.append(read)
    operands = tuple(
        Operand(name, Walk(start, tuple(walk))) for (name, start), walk in zip(box.operands, walks, strict=True)
    )
    return Piece(tuple(dims), Walk(offset, tuple(target)), operands)


def _reshape(box: _Box, shape: tuple[int, ...]) -> _Box | None:
    if 0 in shape:
        return None
    flat = [cut for axis in box.axes for cut in axis.cuts]
    dims = tuple(extent for extent, _ in flat)
    order = [Order(dims, Walk(0, tuple(reads[k] for _, reads in flat))) for k in range(len(box.operands))]
    splits = [through(shape, Walk(0, c_strides(shape)), each) for each in order]
    axes: list[_Axis] = []
    position = 0
    first = splits[0]
    if first is None or any(split is None for split in splits):
        return None
    for group in first.extents:
        cuts = []
        for extent in group:
            cuts.append((extent, tuple(split.walk.strides[position] for split in splits if split is not None)))
            position += 1
        axes.append(_Axis(_merged(cuts)))
    return _Box(tuple(axes), box.operands)


def _with_ones(value: _Mosaic, shape: tuple[int, ...]) -> _Mosaic | None:
    """A mosaic with axes of extent 1 added or taken away; None for any other change of shape."""
    axes = [k for k, extent in enumerate(value.shape) if extent != 1]
    if [value.shape[k] for k in axes] != [extent for extent in shape if extent != 1]:
        return None
    parts = []
    for starts, box in value.parts:
        waiting = iter(axes)
        one = _Axis(((1, (0,) * len(box.operands)),))
        taken = [None if extent == 1 else next(waiting) for extent in shape]
        begin = tuple(0 if k is None else starts[k] for k in taken)
        parts.append((begin, _Box(tuple(one if k is None else box.axes[k] for k in taken), box.operands)))
    return _Mosaic(shape, tuple(parts))


def _merged(cuts: list[tuple[int, tuple[int, ...]]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Neighbouring cuts joined where the outer one steps over exactly the inner one."""
    result: list[tuple[int, tuple[int, ...]]] = []
    for extent, reads in cuts:
        if extent == 1 and len(cuts) > 1 and (result or len(cuts) > 1):
            continue
        if result and result[-1][1] == tuple(extent * read for read in reads):
            result[-1] = (result[-1][0] * extent, reads)
        else:
            result.append((extent, reads))
    return tuple(result) or (cuts[-1],)


def _range(box: _Box, axis: int, begin: int, step: int, extent: int) -> _Box | None:
    cuts = box.axes[axis].cuts
    if len(cuts) != 1 or extent < 1:
        return None
    _, reads = cuts[0]
    step = step if extent > 1 else 0  # steps up to 2**63 may skip everything else
    operands = tuple((name, start + begin * read) for (name, start), read in zip(box.operands, reads, strict=True))
    axes = list(box.axes)
    axes[axis] = _Axis(((extent, tuple(read * step for read in reads)),))
    return _Box(tuple(axes), operands)


def _broadcast(box: _Box, shape: tuple[int, ...]) -> _Box | None:
    none = (0,) * len(box.operands)
    axes = [_Axis(((1, none),))] * (len(shape) - len(box.axes)) + list(box.axes)
    for position, (axis, extent) in enumerate(zip(axes, shape, strict=True)):
        if axis.extent != extent:
            if axis.extent != 1:
                return None
            axes[position] = _Axis(((extent, none),))
    return _Box(tuple(axes), box.operands)


def _paired(first: _Box, second: _Box) -> _Box | None:
    """Two boxes of one shape as a box of their product, cut alike."""
    axes = []
    for a, b in zip(first.axes, second.axes, strict=True):
        if len(a.cuts) == 1 and len(b.cuts) > 1:
            cuts_a, cuts_b = _like(a, b), b.cuts
        elif len(b.cuts) == 1 and len(a.cuts) > 1:
            cuts_a, cuts_b = a.cuts, _like(b, a)
        else:
            cuts_a, cuts_b = a.cuts, b.cuts
        if [e for e, _ in cuts_a] != [e for e, _ in cuts_b]:
            return None
        axes.append(_Axis(tuple((e, (*ra, *rb)) for (e, ra), (_, rb) in zip(cuts_a, cuts_b, strict=True))))
    return _Box(tuple(axes), (*first.operands, *second.operands))


def _like(axis: _Axis, other: _Axis) -> tuple[tuple[int, tuple[int, ...]], ...]:
    extents = tuple(extent for extent, _ in other.cuts)
    _, reads = axis.cuts[0]
    return tuple(
        (extent, tuple(read * step for read in reads)) for extent, step in zip(extents, c_strides(extents), strict=True)
    )


def _without_large(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large constants as inputs: shape inference copies what it is given."""
    small = onnx.ModelProto()
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) > _SMALL:
            break
    else:
        return model
    small.CopyFrom(model)
    kept = []
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) <= _SMALL:
            kept.append(tensor)
        else:
            small.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
            )
    del small.graph.initializer[:]
    small.graph.initializer.extend(kept)
    return small
