"""Persistent kernels for LSTM and GRU layers of small and middle hidden sizes.

The input projection is one matrix product; then the sequence is walked without a launch a step. On compute capability
9.0 and later, a cluster of thread blocks shares a direction and batch element: each block keeps some units' rows of R
in registers and sends their new state into the others' shared memory. Before that, one block does all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.kernels import available
from onnx_refit.engine.cuda.lowering.form import Form
from onnx_refit.engine.cuda.lowering.products import product
from onnx_refit.errors import EngineError

Tensor = Any

_GATES = {"LSTM": 4, "GRU": 3}
_COMMON = "recurrent_common.cu"

# A quarter of a multiprocessor runs every fourth warp and has 16,384 registers; a thread has 255 at most. Beside its
# slice of R a thread of a cluster needs about 40 (what NVRTC reports), of a lone block 16 with little put aside.
_WARP = 32
_QUARTER = 16_384
_MOST = 255
_THREADS = 1024
_HOPPER = 9


@dataclass(frozen=True)
class Shape:
    """How a kernel is spread.

    Attributes:
        blocks: thread blocks a direction and batch element.
        lanes: neighbouring threads that share a hidden unit.
        others: registers beside a thread's slice of R.
    """

    blocks: int
    lanes: int
    others: int

    def threads(self, hidden: int) -> int:
        """Threads of a block."""
        return math.ceil(math.ceil(hidden / self.blocks) * self.lanes / _WARP) * _WARP

    def fits(self, kind: str, hidden: int) -> bool:
        """Whether a thread's slice of R fits into its registers."""
        warps = self.threads(hidden) // _WARP
        registers = min(_MOST, _QUARTER // (-(-warps // 4) * _WARP))
        slice_of_r = _GATES[kind] * -(-hidden // self.lanes)
        return self.threads(hidden) <= _THREADS and slice_of_r + self.others <= registers


_LONE = (Shape(1, 4, 16),)
_CLUSTERS = (Shape(8, 8, 40), Shape(4, 4, 40), Shape(2, 4, 40))


def shape_for(kind: str, hidden: int, sequences: int, major: int, multiprocessors: int) -> Shape | None:
    """How to spread a layer; None where no kernel can hold it.

    Args:
        kind: ``"LSTM"`` or ``"GRU"``.
        hidden: the hidden size.
        sequences: directions times batch.
        major: the GPU's compute capability.
        multiprocessors: how many the GPU has.
    """
    able = [shape for shape in (_CLUSTERS if major >= _HOPPER else _LONE) if shape.fits(kind, hidden)]
    # The more blocks the faster a step, as long as all sequences run at the same time.
    together = (shape for shape in able if shape.blocks * sequences <= multiprocessors)
    return next(together, able[-1] if able else None)


def hidden_size_fits(kind: str, hidden: int, major: int) -> bool:
    """Whether a kernel can hold a layer on a GPU of this compute capability."""
    return shape_for(kind, hidden, 1, major, 1) is not None


def can_run(form: Form) -> bool:
    """Whether a kernel can do this layer: a common LSTM or GRU on a GPU, of a hidden size that fits."""
    if form.kind not in _GATES or not form.common or not form.x.is_cuda:
        return False
    major = torch.cuda.get_device_capability(form.x.device)[0]
    return hidden_size_fits(form.kind, form.hidden, major) and available()


def kernel_operands(form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a kernel reads, in float32: projection [T, B, D, gates * H], R [D, gates * H, H], B [D, 2 * gates * H]."""
    time, batch, inputs = form.x.shape
    directions, gates = form.w.shape[:2]
    projected = product(
        form.x.reshape(time * batch, inputs), form.w.reshape(directions * gates, inputs).t(), dense=True
    )
    biases = None if form.b is None else form.b.float().contiguous()
    return projected.float().view(time, batch, directions, gates), form.r.float().contiguous(), biases


def run(form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y [time, directions, batch, hidden] and the last states; in float32 inside, whatever the dtype outside."""
    time, batch, _ = form.x.shape
    directions = len(form.reversed)
    dtype, device = form.x.dtype, form.x.device
    operands = [*kernel_operands(form), *(None if s is None else s.float().contiguous() for s in (form.h, form.c))]
    y = torch.empty(time, directions, batch, form.hidden, device=device)
    last, cell = (torch.empty(directions, batch, form.hidden, device=device) for _ in range(2))
    backwards = sum(1 << d for d, back in enumerate(form.reversed) if back)
    found = torch.cuda.get_device_properties(device)
    shape = shape_for(form.kind, form.hidden, directions * batch, found.major, found.multi_processor_count)
    if shape is None:
        raise EngineError(f"no kernel holds a hidden size of {form.hidden}")
    kind = form.kind.lower()
    if shape.blocks == 1:
        function = kernels.kernel((_COMMON, "recurrent.cu"), f"{kind}<{form.hidden}, {shape.lanes}>", device.index)
    else:
        instance = f"{kind}_cluster<{form.hidden}, {shape.lanes}, {shape.blocks}>"
        function = kernels.kernel((_COMMON, "recurrent_cluster.cu"), instance, device.index)
    kernels.launch(
        function,
        device,
        (directions * shape.blocks, batch),
        (shape.threads(form.hidden),),
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
