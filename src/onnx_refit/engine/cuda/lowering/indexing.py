"""Operators that pick, place and order."""

from __future__ import annotations

from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Node, Tensor, operator


def _positive(index: Tensor, extent: int) -> Tensor:
    """Indices from the end made indices from the beginning."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + extent, index)


@operator("Gather")
def gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """Rows along an axis, in the shape of the indices."""
    axis = node.get("axis", 0) % x.dim()
    if axis == 0 and x.is_cuda and index.dim():
        return x[index.to(torch.int64)]  # one kernel, which counts negative indices from the end itself
    picked = torch.index_select(x, axis, _positive(index, x.shape[axis]).reshape(-1))
    return picked.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


@operator("GatherElements")
def gather_elements(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """One element for every index."""
    axis = node.get("axis", 0) % x.dim()
    return torch.gather(x, axis, _positive(index, x.shape[axis]))


@operator("GatherND")
def gather_nd(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """Slices by index tuples, beside leading batch dimensions."""
    batch = node.get("batch_dims", 0)
    depth = index.shape[-1]
    parts = [_positive(index[..., i], x.shape[batch + i]) for i in range(depth)]
    leading = []
    for axis in range(batch):
        view = [1] * (index.dim() - 1)
        view[axis] = x.shape[axis]
        leading.append(torch.arange(x.shape[axis], device=x.device).reshape(view))
    return x[(*leading, *parts)]


@operator("ScatterElements", "Scatter")
def scatter_elements(node: Node, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Place one element for every index."""
    axis = node.get("axis", 0) % x.dim()
    index = _positive(index, x.shape[axis])
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.get(node.get("reduction", "none"))
    if how is None:
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, how, include_self=True)


@operator("ScatterND")
def scatter_nd(node: Node, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Place slices by index tuples."""
    depth = index.shape[-1]
    parts = tuple(_positive(index[..., i], x.shape[i]).reshape(-1) for i in range(depth))
    values = updates.reshape((-1, *x.shape[depth:]))
    result, how = x.clone(), node.get("reduction", "none")
    if how in ("none", "add"):
        return result.index_put_(parts, values, accumulate=how == "add")
    flat = result.reshape((-1, *x.shape[depth:]))
    row = torch.zeros_like(parts[0])
    for part, extent in zip(parts, x.shape[:depth], strict=True):
        row = row * extent + part
    flat.index_reduce_(0, row, values, {"mul": "prod", "max": "amax", "min": "amin"}[how], include_self=True)
    return flat.reshape(x.shape)


@operator("OneHot", host=(1,))
def one_hot(node: Node, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """A new axis with the on value at the index and the off value elsewhere (everywhere, if it is out of range)."""
    count = int(depth.reshape(-1)[0].item())
    axis = node.get("axis", -1)
    places = torch.arange(count, device=index.device)
    wanted = index.to(torch.int64)
    wanted = torch.where(wanted < 0, wanted + count, wanted)
    hit = wanted.unsqueeze(-1) == places
    return torch.where(hit, values[1], values[0]).movedim(-1, axis)


@operator("NonZero")
def non_zero(node: Node, x: Tensor) -> Tensor:
    """Where it is not zero; its shape depends on values, so it waits for the device."""
    return torch.nonzero(x).t()


@operator("ArgMax", "ArgMin")
def arg_extreme(node: Node, x: Tensor) -> Tensor:
    """The first (or last) index of the largest or smallest element."""
    axis, keep = node.get("axis", 0) % x.dim(), bool(node.get("keepdims", 1))
    extreme = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    if node.get("select_last_index", 0):
        return x.shape[axis] - 1 - extreme(x.flip(axis), axis, keepdim=keep)
    return extreme(x, axis, keepdim=keep)  # PyTorch promises the first among equals


@operator("TopK", host=(1,))
def top_k(node: Node, x: Tensor, k: Tensor | None = None) -> Any:
    """The largest or smallest elements with their indices, the lower index first among equals."""
    count = int(k.reshape(-1)[0].item()) if k is not None else int(node.get("k"))
    axis = node.get("axis", -1)
    values, index = torch.sort(x, dim=axis, descending=bool(node.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), index.narrow(axis, 0, count)


@operator("CumSum", host=(1,))
def cumulative_sum(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    """Running sums."""
    along = int(axis.reshape(-1)[0].item())
    y = x.flip(along) if node.get("reverse", 0) else x
    total = torch.cumsum(y, along, dtype=x.dtype)
    if node.get("exclusive", 0):
        total = total - y
    return total.flip(along) if node.get("reverse", 0) else total


@operator("ReverseSequence")
def reverse_sequence(node: Node, x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the first elements of every row, as many as its length says."""
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    y = x.movedim((time, batch), (0, 1))
    steps = torch.arange(y.shape[0], device=x.device).unsqueeze(1)
    lengths = lengths.to(torch.int64).unsqueeze(0)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    index = index.reshape((*index.shape, *[1] * (y.dim() - 2))).expand(y.shape)
    return torch.gather(y, 0, index).movedim((0, 1), (time, batch))
