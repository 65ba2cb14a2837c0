"""A persistent kernel for LSTM layers of small hidden size.

The input projection is one matrix product; then one thread block for each direction and batch element walks the whole
sequence. Each thread keeps one gate row of the recurrent matrix in registers, the hidden state lies in shared memory,
so a step costs two barriers and no launch. The prototype of this kernel was measured on an H100 (see docs/gpu.md);
this form of it, with initial states, last states and lone backward directions, was **not run** on a GPU.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnx_refit.errors import MissingExtraError

if TYPE_CHECKING:
    from onnx_refit.engine.cuda.lowering.recurrent import Form

Tensor = Any

SOURCE = r"""
template <int H>
__global__ __launch_bounds__(4 * H, 1) void lstm(
    const float* __restrict__ xp,   // [T, B, D, 4H] projection and both biases
    const float* __restrict__ R,    // [D, 4H, H]
    const float* __restrict__ h0,   // [D, B, H] or null
    const float* __restrict__ c0,   // [D, B, H] or null
    float* __restrict__ y,          // [T, D, B, H]
    float* __restrict__ hn,         // [D, B, H]
    float* __restrict__ cn,         // [D, B, H]
    int T, int B, int D, int backwards) {  // bit d of backwards: direction d walks from the end
  const int d = blockIdx.x, b = blockIdx.y, g = threadIdx.x;
  __shared__ __align__(16) float h[2][H];
  __shared__ float gate[4 * H];
  float r[H];
  const float4* rows = reinterpret_cast<const float4*>(R + ((size_t)d * 4 * H + g) * H);
#pragma unroll
  for (int k = 0; k < H / 4; ++k) {
    const float4 v = rows[k];
    r[4 * k] = v.x; r[4 * k + 1] = v.y; r[4 * k + 2] = v.z; r[4 * k + 3] = v.w;
  }
  const size_t state = ((size_t)d * B + b) * H;
  float c = 0.f;
  if (g < H) {
    h[0][g] = h0 ? h0[state + g] : 0.f;
    c = c0 ? c0[state + g] : 0.f;
  }
  const bool back = (backwards >> d) & 1;
  const int step = back ? -1 : 1;
  int t = back ? T - 1 : 0;
  const size_t row = (size_t)D * 4 * H;
  float x = T > 0 ? xp[((size_t)t * B + b) * row + (size_t)d * 4 * H + g] : 0.f;
  __syncthreads();
  int cur = 0;
  for (int s = 0; s < T; ++s, t += step) {
    float a0 = x, a1 = 0.f, a2 = 0.f, a3 = 0.f;
    // The next step's projection is on its way while this step computes.
    if (s + 1 < T) x = xp[((size_t)(t + step) * B + b) * row + (size_t)d * 4 * H + g];
    const float4* hv = reinterpret_cast<const float4*>(h[cur]);
#pragma unroll
    for (int k = 0; k < H / 4; ++k) {
      const float4 v = hv[k];
      a0 += r[4 * k] * v.x; a1 += r[4 * k + 1] * v.y; a2 += r[4 * k + 2] * v.z; a3 += r[4 * k + 3] * v.w;
    }
    const float a = (a0 + a1) + (a2 + a3);
    gate[g] = g < 3 * H ? 1.f / (1.f + __expf(-a)) : 1.f - 2.f / (1.f + __expf(2.f * a));  // i o f | c
    __syncthreads();
    if (g < H) {
      c = gate[2 * H + g] * c + gate[g] * gate[3 * H + g];
      const float v = gate[H + g] * (1.f - 2.f / (1.f + __expf(2.f * c)));
      h[cur ^ 1][g] = v;
      y[(((size_t)t * D + d) * B + b) * H + g] = v;
    }
    cur ^= 1;
    __syncthreads();
  }
  if (g < H) {
    hn[state + g] = h[cur][g];
    cn[state + g] = c;
  }
}
"""

# A block of 4H threads must fit into the 65,536 registers of a multiprocessor with about 40 beside the row of R.
_REGISTERS = 65_536
_OTHER_REGISTERS = 40


def hidden_size_fits(hidden: int) -> bool:
    """Whether a row of R fits into a thread's registers, and all threads into a multiprocessor."""
    return hidden >= 4 and hidden % 4 == 0 and 4 * hidden * (hidden + _OTHER_REGISTERS) <= _REGISTERS


def can_run(form: Form) -> bool:
    """Whether the kernel can do this layer: a common LSTM on a GPU, of a hidden size that fits."""
    return form.kind == "LSTM" and form.common and form.x.is_cuda and hidden_size_fits(form.hidden) and available()


@cache
def available() -> bool:
    """Whether CuPy is installed, which compiles the kernel at run time (NVRTC)."""
    try:
        _cupy()
    except MissingExtraError:
        return False
    return True


def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise MissingExtraError("cupy", "cuda", "the persistent LSTM kernel") from error


@cache
def _kernel(hidden: int) -> Any:
    name = f"lstm<{hidden}>"
    module = _cupy().RawModule(code=SOURCE, options=("--std=c++17",), name_expressions=[name])
    return module.get_function(name)


def run(form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Y [time, directions, batch, hidden] and the last states; in float32 inside, whatever the dtype outside."""
    time, batch, inputs = form.x.shape
    directions, gates = form.w.shape[:2]
    dtype, device = form.x.dtype, form.x.device
    flat, rows = form.x.reshape(time * batch, inputs), form.w.reshape(directions * gates, inputs)
    if form.b is None:
        projected = torch.mm(flat, rows.t()).float()
    else:
        bias = (form.b[:, :gates] + form.b[:, gates:]).reshape(-1)
        projected = torch.addmm(bias, flat, rows.t()).float()
    recurrent = form.r.float().contiguous()
    states = [None if state is None else state.float().contiguous() for state in (form.h, form.c)]
    y = torch.empty(time, directions, batch, form.hidden, device=device)
    last, cell = (torch.empty(directions, batch, form.hidden, device=device) for _ in range(2))
    backwards = sum(1 << d for d, back in enumerate(form.reversed) if back)
    cupy = _cupy()
    with cupy.cuda.Device(device.index or 0), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        _kernel(form.hidden)(
            (directions, batch),
            (gates,),
            (
                projected.data_ptr(),
                recurrent.data_ptr(),
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
    return y.to(dtype), last.to(dtype), cell.to(dtype)
