"""Products, convolutions and pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from onnx_refit.engine.cuda.lowering import tuning
from onnx_refit.engine.cuda.lowering.operators import Node, Tensor, operator
from onnx_refit.errors import EngineError

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


@operator("MatMul")
def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices, or of stacks of them."""
    return torch.matmul(a, b)


@operator("Gemm")
def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """``alpha * A' B' + beta * C``."""
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if c is None or beta == 0:
        return torch.mm(a, b) if alpha == 1 else torch.mm(a, b) * alpha
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


@operator("Einsum")
def einsum(node: Node, *operands: Tensor) -> Tensor:
    """A sum of products by an equation."""
    return torch.einsum(node.get("equation").replace(" ", ""), *operands)


def _window(node: Node, rank: int) -> tuple[list[int], list[int]]:
    return list(node.get("strides") or [1] * rank), list(node.get("dilations") or [1] * rank)


def _pads(node: Node, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], steps: Sequence[int]) -> Any:
    """Begin and end padding of every spatial axis."""
    rank, how = len(sizes), node.get("auto_pad", "NOTSET")
    if how in ("NOTSET", ""):
        given = list(node.get("pads") or [0] * (2 * rank))
        return [(given[axis], given[axis + rank]) for axis in range(rank)]
    if how == "VALID":
        return [(0, 0)] * rank
    both = []
    for size, k, stride, step in zip(sizes, kernel, strides, steps, strict=True):
        wanted = -(-size // stride)
        total = max(0, (wanted - 1) * stride + (k - 1) * step + 1 - size)
        less, more = total // 2, total - total // 2
        both.append((less, more) if how == "SAME_UPPER" else (more, less))
    return both


def _padded(x: Tensor, pads: Any, value: float = 0.0) -> Tensor:
    flat = [width for before_after in reversed(pads) for width in before_after]
    return functional.pad(x, flat, value=value) if any(flat) else x


@operator("Conv")
def conv(node: Node, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution over one, two or three axes."""
    rank = x.dim() - 2
    strides, steps = _window(node, rank)
    pads = _pads(node, x.shape[2:], w.shape[2:], strides, steps)
    symmetric = all(before == after for before, after in pads)
    padding = [before for before, _ in pads] if symmetric else [0] * rank
    x = x if symmetric else _padded(x, pads)
    group = node.get("group", 1)
    function = _by_rank(node, _CONVOLUTIONS, rank)
    if not x.is_cuda or rank != 2 or group != 1 or bias is not None:
        return function(x, w, bias, strides, padding, steps, group)
    ways = _convolutions(x, w, strides, padding, steps)
    key = ("convolution", *x.shape, *w.shape, *strides, *padding, *steps, x.dtype, x.stride())
    return tuning.fastest(key, ways, x)


_MOST_COLUMNS = 1 << 26  # elements that a convolution may be spread out to


def _convolutions(x: Tensor, w: Tensor, strides: Any, padding: Any, steps: Any) -> dict[str, Callable[[], Tensor]]:
    """The ways to convolve over two axes: cuDNN's in either layout, or a product with the spread-out input.

    For one image, cuDNN's float32 kernels leave most of a large GPU idle; a product can be cut along its sum.
    """
    batch, outs = x.shape[0], w.shape[0]
    sizes = [
        (size + 2 * pad - step * (k - 1) - 1) // stride + 1
        for size, pad, step, k, stride in zip(x.shape[2:], padding, steps, w.shape[2:], strides, strict=True)
    ]
    depth = w.shape[1] * w.shape[2] * w.shape[3]
    flat = w.reshape(outs, depth)

    def columns() -> Tensor:
        if list(w.shape[2:]) == [1, 1] and list(strides) == [1, 1] and not any(padding):
            return x.reshape(batch, depth, -1)
        return functional.unfold(x, tuple(w.shape[2:]), tuple(steps), tuple(padding), tuple(strides))

    def whole() -> Tensor:
        return torch.matmul(flat, columns()).reshape(batch, outs, *sizes)

    def cut(parts: int) -> Tensor:
        spread = columns()[0].unflatten(0, (parts, -1))
        sums = torch.bmm(flat.unflatten(1, (parts, -1)).transpose(0, 1), spread)
        return sums.sum(0).reshape(1, outs, *sizes)

    def channels_last() -> Tensor:
        last = torch.channels_last
        return functional.conv2d(
            x.contiguous(memory_format=last), w.contiguous(memory_format=last), None, strides, padding, steps
        ).contiguous()

    ways: dict[str, Callable[[], Tensor]] = {
        "library": lambda: functional.conv2d(x, w, None, strides, padding, steps),
        "channels last": channels_last,
    }
    if batch * depth * sizes[0] * sizes[1] <= _MOST_COLUMNS:
        ways["product"] = whole
        for parts in (2, 4, 8, 16):
            if batch == 1 and depth % parts == 0 and depth // parts >= 64:
                ways[f"product in {parts} parts"] = lambda parts=parts: cut(parts)  # type: ignore[misc]
    return ways


@operator("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Transposed convolution; what padding takes away is cut off after it."""
    rank = x.dim() - 2
    strides, steps = _window(node, rank)
    extra = list(node.get("output_padding") or [0] * rank)
    function = _by_rank(node, _TRANSPOSED, rank)
    full = function(x, w, None, strides, 0, 0, node.get("group", 1), steps)
    for axis, (before, after) in enumerate(_transposed_pads(node, x, w, strides, steps, extra)):
        size = full.shape[axis + 2] + extra[axis] - before - after
        missing = max(0, before + size - full.shape[axis + 2])
        if missing:
            full = functional.pad(full, [0, 0] * (rank - 1 - axis) + [0, missing])
        full = full.narrow(axis + 2, before, size)
    return full if bias is None else full + bias.reshape(1, -1, *[1] * rank)


def _transposed_pads(node: Node, x: Tensor, w: Tensor, strides: list[int], steps: list[int], extra: list[int]) -> Any:
    rank, how, wanted = len(strides), node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and how in ("NOTSET", "", "VALID"):
        given = list(node.get("pads") or [0] * (2 * rank)) if how != "VALID" else [0] * (2 * rank)
        return [(given[axis], given[axis + rank]) for axis in range(rank)]
    both = []
    for axis in range(rank):
        size = x.shape[axis + 2] * strides[axis] if wanted is None else wanted[len(wanted) - rank + axis]
        reach = (w.shape[axis + 2] - 1) * steps[axis] + 1
        total = strides[axis] * (x.shape[axis + 2] - 1) + extra[axis] + reach - size
        less, more = total // 2, total - total // 2
        both.append((less, more) if how == "SAME_UPPER" else (more, less))
    return both


def _by_rank(node: Node, functions: dict[int, Any], rank: int) -> Any:
    found = functions.get(rank)
    if found is None:
        raise EngineError(f"{node.op_type} over {rank} axes is not supported", where=node.name)
    return found


def _ceil_padding(
    sizes: Sequence[int], pads: Any, kernel: Sequence[int], strides: Sequence[int], steps: Sequence[int]
) -> list[tuple[int, int]]:
    """End padding that makes the last window whole, unless it would begin in the padding behind the tensor."""
    both = []
    for size, (before, after), k, stride, step in zip(sizes, pads, kernel, strides, steps, strict=True):
        reach = (k - 1) * step + 1
        padded = size + before + after
        windows = -(-(padded - reach) // stride) + 1
        if (windows - 1) * stride >= size + before:
            windows -= 1
        both.append((before, after + max(0, (windows - 1) * stride + reach - padded)))
    return both


@operator("MaxPool")
def max_pool(node: Node, x: Tensor) -> Any:
    """The largest element of every window; its place on request."""
    rank = x.dim() - 2
    kernel = list(node.get("kernel_shape"))
    strides, steps = _window(node, rank)
    pads = _pads(node, x.shape[2:], kernel, strides, steps)
    if node.get("ceil_mode", 0):
        pads = _ceil_padding(x.shape[2:], pads, kernel, strides, steps)
    if node.outputs > 1:
        raise EngineError("MaxPool with indices is not supported", where=node.name)
    lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    y = _padded(x, pads, lowest)
    if not x.is_floating_point():
        return _by_rank(node, _MAX_POOLS, rank)(y.float(), kernel, strides, 0, steps).to(x.dtype)
    return _by_rank(node, _MAX_POOLS, rank)(y, kernel, strides, 0, steps)


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    """The mean of every window; padding counts only if asked for, and never what ceil mode adds."""
    rank = x.dim() - 2
    kernel = list(node.get("kernel_shape"))
    strides, steps = _window(node, rank)
    if any(step != 1 for step in steps):
        raise EngineError("AveragePool with dilations is not supported", where=node.name)
    pads = _pads(node, x.shape[2:], kernel, strides, steps)
    whole = _ceil_padding(x.shape[2:], pads, kernel, strides, steps) if node.get("ceil_mode", 0) else pads
    function = _by_rank(node, _AVERAGE_POOLS, rank)
    if not any(before or after for before, after in whole):
        return function(x, kernel, strides)
    counted = torch.ones_like(x[:1, :1])
    counted = _padded(counted, pads, 1.0 if node.get("count_include_pad", 0) else 0.0)
    extra = [(0, end - after) for (_, after), (_, end) in zip(pads, whole, strict=True)]
    return function(_padded(x, whole), kernel, strides) / function(_padded(counted, extra), kernel, strides)
