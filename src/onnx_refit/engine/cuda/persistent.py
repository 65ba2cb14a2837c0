"""Persistent kernels for LSTM and GRU layers of small hidden size.

The input projection is one matrix product; then one thread block for each direction and batch element walks the whole
sequence. Each thread keeps one gate row of the recurrent matrix in registers, the hidden state lies in shared memory,
so a step costs two barriers and no launch. The prototype of the LSTM kernel was measured on an H100 (see docs/gpu.md);
the kernels in ``recurrent.cu`` were compiled for compute capability 9.0 and **not run** on a GPU.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnx_refit.errors import MissingExtraError

if TYPE_CHECKING:
    from onnx_refit.engine.cuda.lowering.recurrent import Form

Tensor = Any

_GATES = {"LSTM": 4, "GRU": 3}

# A block of gates * H threads must fit into the 65,536 registers of a multiprocessor, each thread with a row of R and
# about 40 beside it (what NVRTC reports without spilling), and a thread has at most 255.
_REGISTERS = 65_536
_OTHER_REGISTERS = 40
_THREADS = 1024


def hidden_size_fits(kind: str, hidden: int) -> bool:
    """Whether a row of R fits into a thread's registers, and all threads into a multiprocessor."""
    threads = _GATES[kind] * hidden
    fits = threads <= _THREADS and threads * (hidden + _OTHER_REGISTERS) <= _REGISTERS
    return hidden >= 4 and hidden % 4 == 0 and fits


def can_run(form: Form) -> bool:
    """Whether a kernel can do this layer: a common LSTM or GRU on a GPU, of a hidden size that fits."""
    if form.kind not in _GATES or not form.common or not form.x.is_cuda:
        return False
    return hidden_size_fits(form.kind, form.hidden) and available()


@cache
def available() -> bool:
    """Whether CuPy is installed, which compiles the kernels at run time (NVRTC)."""
    try:
        _cupy()
    except MissingExtraError:
        return False
    return True


def source() -> str:
    """The CUDA source of the kernels."""
    return files("onnx_refit.engine.cuda").joinpath("recurrent.cu").read_text()


def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise MissingExtraError("cupy", "cuda", "the persistent recurrent kernels") from error


@cache
def _kernel(kind: str, hidden: int) -> Any:
    name = f"{kind.lower()}<{hidden}>"
    module = _cupy().RawModule(code=source(), options=("--std=c++17",), name_expressions=[name])
    return module.get_function(name)


def kernel_operands(form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel reads, in float32: projection [T, B, D, gates * H], R [D, gates * H, H], bias of h [D, H]."""
    time, batch, inputs = form.x.shape
    directions, gates = form.w.shape[:2]
    flat, rows = form.x.reshape(time * batch, inputs), form.w.reshape(directions * gates, inputs)
    kept = torch.zeros(directions, form.hidden, dtype=form.x.dtype, device=form.x.device)
    if form.b is None:
        projected = torch.mm(flat, rows.t())
    else:
        bias = form.b[:, :gates] + form.b[:, gates:]
        if form.kind == "GRU":
            # The reset gate scales the recurrent part of the candidate, its bias included: that one comes later.
            size = 2 * form.hidden
            kept = form.b[:, gates + size :]
            bias = torch.cat([bias[:, :size], form.b[:, size:gates]], 1)
        projected = torch.addmm(bias.reshape(-1), flat, rows.t())
    shape = (time, batch, directions, gates)
    return projected.float().reshape(shape), form.r.float().contiguous(), kept.float().contiguous()


def run(form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y [time, directions, batch, hidden] and the last states; in float32 inside, whatever the dtype outside."""
    time, batch, _ = form.x.shape
    directions, gates = form.w.shape[:2]
    dtype, device = form.x.dtype, form.x.device
    projected, recurrent, bias = kernel_operands(form)
    states = [None if state is None else state.float().contiguous() for state in (form.h, form.c)]
    y = torch.empty(time, directions, batch, form.hidden, device=device)
    last, cell = (torch.empty(directions, batch, form.hidden, device=device) for _ in range(2))
    backwards = sum(1 << d for d, back in enumerate(form.reversed) if back)
    cupy = _cupy()
    with cupy.cuda.Device(device.index or 0), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        _kernel(form.kind, form.hidden)(
            (directions, batch),
            (gates,),
            (
                projected.data_ptr(),
                recurrent.data_ptr(),
                bias.data_ptr(),
                *(0 if state is None else state.data_ptr() for state in states),
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
