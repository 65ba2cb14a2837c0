"""Persistent kernels for LSTM and GRU layers of small hidden size.

The input projection is one matrix product; then one thread block for each direction and batch element walks the whole
sequence. Four neighbouring threads share a hidden unit: each keeps a slice of the unit's rows of R in registers, the
state lies in shared memory, so a step costs one barrier and no launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.kernels import available
from onnx_refit.engine.cuda.lowering.products import product

if TYPE_CHECKING:
    from onnx_refit.engine.cuda.lowering.recurrent import Form

Tensor = Any

_GATES = {"LSTM": 4, "GRU": 3}

# Four threads a hidden unit. A quarter of a multiprocessor runs every fourth warp and has 16,384 registers, so that a
# thread of 16 warps has 128, and 28 of them are taken (what NVRTC reports; a few more go to local memory, slower).
_LANES = 4
_WARP = 32
_QUARTER = 16_384
_MOST = 255
_OTHERS = 16


def hidden_size_fits(kind: str, hidden: int) -> bool:
    """Whether a thread's slice of R fits into its registers."""
    warps = -(-hidden * _LANES // _WARP)
    registers = min(_MOST, _QUARTER // (-(-warps // 4) * _WARP))
    return warps <= _WARP and _GATES[kind] * -(-hidden // _LANES) + _OTHERS <= registers


def can_run(form: Form) -> bool:
    """Whether a kernel can do this layer: a common LSTM or GRU on a GPU, of a hidden size that fits."""
    if form.kind not in _GATES or not form.common or not form.x.is_cuda:
        return False
    return hidden_size_fits(form.kind, form.hidden) and available()


def kernel_operands(form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a kernel reads, in float32: projection [T, B, D, gates * H], R [D, gates * H, H], B [D, 2 * gates * H]."""
    time, batch, inputs = form.x.shape
    directions, gates = form.w.shape[:2]
    projected = product(form.x.reshape(time * batch, inputs), form.w.reshape(directions * gates, inputs).t())
    biases = None if form.b is None else form.b.float().contiguous()
    # Of the transposed result of a product that is fastest that way, a copy.
    return projected.float().contiguous().view(time, batch, directions, gates), form.r.float().contiguous(), biases


def run(form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y [time, directions, batch, hidden] and the last states; in float32 inside, whatever the dtype outside."""
    time, batch, _ = form.x.shape
    directions = len(form.reversed)
    dtype, device = form.x.dtype, form.x.device
    operands = [*kernel_operands(form), *(None if s is None else s.float().contiguous() for s in (form.h, form.c))]
    y = torch.empty(time, directions, batch, form.hidden, device=device)
    last, cell = (torch.empty(directions, batch, form.hidden, device=device) for _ in range(2))
    backwards = sum(1 << d for d, back in enumerate(form.reversed) if back)
    kernels.launch(
        kernels.kernel("recurrent.cu", f"{form.kind.lower()}<{form.hidden}, {_LANES}>", device.index or 0),
        device,
        (directions, batch),
        (-(-form.hidden * _LANES // _WARP) * _WARP,),
        (
            *(0 if operand is None else operand.data_ptr() for operand in operands),
            y.data_ptr(),
            last.data_ptr(),
            cell.data_ptr(),
            np.int32(time),
            np.int32(batch),
            np.int32(directions),
            np.int32(backwards),
        ),
    )
    return y.to(dtype), last.to(dtype), cell.to(dtype) if form.kind == "LSTM" else None
