"""Operators that make, move and cut: shapes, slices, joins."""

from __future__ import annotations

import math
from typing import Any

import onnx
import torch
from torch.nn import functional

from onnx_refit.engine.cuda.lowering.operators import Node, Tensor, ints, operator
from onnx_refit.errors import EngineError


@operator("Shape", makes_host=True)
def shape(node: Node, x: Tensor) -> Tensor:
    """The dimensions, on the host."""
    return torch.tensor(list(x.shape)[node.get("start", 0) : node.get("end")], dtype=torch.int64)


@operator("Size", makes_host=True)
def size(node: Node, x: Tensor) -> Tensor:
    """The number of elements, on the host."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape", host=(1,))
def reshape(node: Node, x: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Other dimensions; 0 keeps one, -1 is what remains."""
    sizes = ints(wanted) if wanted is not None else list(node.get("shape"))
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if value == 0 else value for axis, value in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """Two dimensions, split before an axis."""
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    rows = 1
    for dim in x.shape[:axis]:
        rows *= dim
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, x.numel() // max(rows, 1))


def _axes(node: Node, given: Tensor | None) -> list[int] | None:
    if given is not None:
        return ints(given)
    axes = node.get("axes")
    return None if axes is None else [int(axis) for axis in axes]


@operator("Squeeze", host=(1,))
def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Drop dimensions of size 1."""
    chosen = _axes(node, axes)
    if chosen is None:
        return x.squeeze()
    gone = {axis % x.dim() for axis in chosen}
    return x.reshape([dim for axis, dim in enumerate(x.shape) if axis not in gone])


@operator("Unsqueeze", host=(1,))
def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Insert dimensions of size 1."""
    chosen = _axes(node, axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """Permute dimensions; without a permutation reverse them."""
    return x.permute(node.get("perm") or list(range(x.dim()))[::-1])


@operator("Concat")
def concat(node: Node, *parts: Tensor) -> Tensor:
    """Join along an axis."""
    return torch.cat(parts, node.get("axis", 1))


@operator("Split", host=(1,))
def split(node: Node, x: Tensor, sizes: Tensor | None = None) -> Any:
    """Cut along an axis: into given sizes, or into equal parts (the last may be smaller)."""
    axis = node.get("axis", 0)
    parts = ints(sizes) if sizes is not None else node.get("split")
    if parts is None:
        count = node.get("num_outputs", node.outputs)
        step = -(-x.shape[axis] // count)
        parts = [min(step, max(0, x.shape[axis] - step * index)) for index in range(count)]
    return torch.split(x, list(parts), axis)


@operator("Slice", host=(1, 2, 3, 4))
def slice_(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Cut; attributes before opset 10. PyTorch has no negative steps: those gather."""
    begin = ints(starts) if starts is not None else list(node.get("starts"))
    end = ints(ends) if ends is not None else list(node.get("ends"))
    chosen = _axes(node, axes)
    along = list(range(len(begin))) if chosen is None else chosen
    stride = ints(steps) if steps is not None else [1] * len(begin)
    for first, last, axis, step in zip(begin, end, along, stride, strict=True):
        extent = x.shape[axis]
        low, high, _ = slice(first, last, step).indices(extent) if step > 0 else (0, 0, 0)
        if step > 0:
            x = x.narrow(axis, low, max(0, high - low))
            if step > 1:
                x = x[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]
            continue
        x = torch.index_select(x, axis, _backwards(first, last, step, extent, x.device))
    return x


def _backwards(first: int, last: int, step: int, extent: int, device: Any) -> Tensor:
    begin = min(max(first + extent if first < 0 else first, -1), extent - 1)
    # ONNX clamps an end of "before the beginning" to -1, which for Python would mean the last element.
    end = min(begin, max(last + extent if last < 0 else last, -1))
    # Made where it is needed: a copy from the host cannot be recorded in a CUDA graph.
    return torch.arange(begin, end, step, dtype=torch.int64, device=device)


@operator("Expand", host=(1,))
def expand(node: Node, x: Tensor, wanted: Tensor) -> Tensor:
    """Broadcast to a shape (both ways, as for arithmetic)."""
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(wanted))))


@operator("Tile", host=(1,))
def tile(node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    """Repeat along every axis."""
    return x.repeat(ints(repeats))


@operator("Pad", host=(1, 2, 3))
def pad(
    node: Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Add a border; attributes before opset 11."""
    widths = ints(pads) if pads is not None else list(node.get("pads"))
    along = [axis % x.dim() for axis in ints(axes)] if axes is not None else list(range(x.dim()))
    mode = node.get("mode", "constant")
    fill = node.get("value", 0.0) if value is None else value.item()
    both = {axis: (widths[i], widths[i + len(along)]) for i, axis in enumerate(along)}
    if mode == "constant":
        if x.is_floating_point() and math.isfinite(fill):
            limit = torch.finfo(x.dtype).max
            fill = min(max(fill, -limit), limit)  # a model's -1e9 where halves end at 65504
        flat = [width for axis in reversed(range(x.dim())) for width in both.get(axis, (0, 0))]
        return functional.pad(x, flat, value=fill)
    for axis, (before, after) in both.items():
        if before or after:
            x = torch.index_select(x, axis, _border(node, x, axis, before, after))
    return x


def _border(node: Node, x: Tensor, axis: int, before: int, after: int) -> Tensor:
    extent, mode = x.shape[axis], node.get("mode")
    index = torch.arange(-before, extent + after, device=x.device)
    if mode == "edge":
        index = index.clamp(0, extent - 1)
    elif mode == "wrap":
        index = index % extent
    elif mode == "reflect":
        period = max(1, 2 * (extent - 1))
        index = index % period
        index = torch.where(index >= extent, period - index, index)
    else:
        raise EngineError(f"the padding mode {mode} is not known", where=node.name)
    return index


@operator("ConstantOfShape", host=(0,))
def constant_of_shape(node: Node, wanted: Tensor) -> Tensor:
    """A tensor of one value; on the host until something on the device reads it."""
    value = node.get("value")
    if value is None:
        return torch.zeros(ints(wanted), dtype=torch.float32)
    array = onnx.numpy_helper.to_array(value).reshape(-1)
    return torch.full(ints(wanted), array[0].item(), dtype=torch.from_numpy(array).dtype)


@operator("Range", host=(0, 1, 2))
def range_(node: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """Ascending or descending numbers."""
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


@operator("EyeLike")
def eye_like(node: Node, x: Tensor) -> Tensor:
    """Ones on a diagonal."""
    dtype = node.dtype(node.get("dtype")) if node.get("dtype") is not None else x.dtype
    ones = torch.ones(x.shape[0], x.shape[1], dtype=dtype, device=x.device)
    return ones.tril(node.get("k", 0)).triu(node.get("k", 0))


@operator("Trilu", host=(1,))
def trilu(node: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    """The upper or lower triangle."""
    diagonal = 0 if k is None else int(k.item())
    return x.triu(diagonal) if node.get("upper", 1) else x.tril(diagonal)


@operator("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Blocks of channels as pixels."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Blocks of pixels as channels."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    order = (0, 3, 5, 1, 2, 4) if node.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).permute(order).reshape(n, c * b * b, h // b, w // b)
