"""A bidirectional LSTM over many sequences at once, as two persistent CUDA kernels (forward and backward).

cuDNN launches several kernels for each step of a batch of sequences of different lengths, which costs BiDAF nine
tenths of its training time. Here one thread block walks one sequence in one direction without leaving the
multiprocessor: each of its ``4 * hidden`` threads keeps a row (forward) or a piece of a column (backward) of the
recurrent matrix in registers, the state lies in shared memory, and no padding is computed. What is no recurrence
(input projections, gradients of the matrices) is left to one matrix product each.

Needs CuPy to compile the kernels; :func:`available` says whether they can be used, and the model falls back to cuDNN.
Gates are in torch's order: input, forget, cell, output.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["SOURCE", "available", "bidirectional_lstm"]

_MAX_HIDDEN = 104

SOURCE = r"""
__device__ __forceinline__ float sigmoid_(float v) { return 1.f / (1.f + __expf(-v)); }
__device__ __forceinline__ float tanh_(float v) { return 1.f - 2.f / (1.f + __expf(2.f * v)); }

// One block a sequence (x) and direction (y); thread = gate row. n counts the tokens of all sequences.
template <int H>
__global__ __launch_bounds__(4 * H, 1) void lstm_forward(
    const float* __restrict__ projected,   // [n, 2, 4H] input projections with biases
    const float* __restrict__ recurrent,   // [2, 4H, H]
    const int* __restrict__ offsets,       // [sequences + 1]
    float* __restrict__ out,               // [n, 2H]
    float* __restrict__ gates,             // [n, 2, 4H] after their nonlinearities
    float* __restrict__ cells,             // [n, 2, H]
    float* __restrict__ before)            // [n, 2, H] the hidden state before each step
{
  const int direction = blockIdx.y, row = threadIdx.x, kind = row / H;
  const int first = offsets[blockIdx.x], count = offsets[blockIdx.x + 1] - first;
  __shared__ __align__(16) float state[2][(H + 3) / 4 * 4];
  __shared__ float gate[4 * H];
  float weight[H];
  const float* source = recurrent + ((size_t)direction * 4 * H + row) * H;
#pragma unroll
  for (int k = 0; k < H; ++k) weight[k] = source[k];
  if (row < H) state[0][row] = 0.f;
  if (count <= 0) return;
  float cell = 0.f;
  const int step = direction ? -1 : 1;
  int token = direction ? first + count - 1 : first;
  float next = projected[((size_t)token * 2 + direction) * 4 * H + row];
  __syncthreads();
  for (int s = 0, current = 0; s < count; ++s, token += step, current ^= 1) {
    const size_t place = (size_t)token * 2 + direction;
    float sum0 = next, sum1 = 0.f, sum2 = 0.f, sum3 = 0.f;
    if (s + 1 < count) next = projected[((size_t)(token + step) * 2 + direction) * 4 * H + row];
    const float4* hidden = reinterpret_cast<const float4*>(state[current]);
#pragma unroll
    for (int k = 0; k < H / 4; ++k) {
      const float4 h = hidden[k];
      sum0 += weight[4 * k] * h.x;
      sum1 += weight[4 * k + 1] * h.y;
      sum2 += weight[4 * k + 2] * h.z;
      sum3 += weight[4 * k + 3] * h.w;
    }
    const float sum = (sum0 + sum1) + (sum2 + sum3);
    const float value = kind == 2 ? tanh_(sum) : sigmoid_(sum);
    gate[row] = value;
    gates[place * 4 * H + row] = value;
    if (kind == 1) before[place * H + row - H] = state[current][row - H];
    __syncthreads();
    if (row < H) {
      cell = gate[H + row] * cell + gate[row] * gate[2 * H + row];
      const float h = gate[3 * H + row] * tanh_(cell);
      state[current ^ 1][row] = h;
      out[place * H + row] = h;
      cells[place * H + row] = cell;
    }
    __syncthreads();
  }
}

// The same walk backwards; thread = (gate kind, hidden unit), a quarter of a column of the recurrent matrix each.
template <int H>
__global__ __launch_bounds__(4 * H, 1) void lstm_backward(
    const float* __restrict__ out_gradient,   // [n, 2H]
    const float* __restrict__ recurrent,      // [2, 4H, H]
    const int* __restrict__ offsets,          // [sequences + 1]
    const float* __restrict__ gates,          // [n, 2, 4H]
    const float* __restrict__ cells,          // [n, 2, H]
    float* __restrict__ projected_gradient)   // [n, 2, 4H]
{
  const int direction = blockIdx.y, row = threadIdx.x, kind = row / H, unit = row % H;
  const int first = offsets[blockIdx.x], count = offsets[blockIdx.x + 1] - first;
  __shared__ __align__(16) float delta[4 * H];
  __shared__ float part[4][H];
  float weight[H];
  const float* source = recurrent + ((size_t)direction * 4 * H + (size_t)kind * H) * H + unit;
#pragma unroll
  for (int k = 0; k < H; ++k) weight[k] = source[(size_t)k * H];
  part[kind][unit] = 0.f;
  if (count <= 0) return;
  float cell_gradient = 0.f;
  const int step = direction ? 1 : -1;
  int token = direction ? first : first + count - 1;
  __syncthreads();
  for (int s = 0; s < count; ++s, token += step) {
    const size_t place = (size_t)token * 2 + direction;
    if (row < H) {
      const float* g = gates + place * 4 * H;
      const float in = g[row], forget = g[H + row], candidate = g[2 * H + row], open = g[3 * H + row];
      const float cell = cells[place * H + row];
      const float previous = s + 1 < count ? cells[((size_t)(token + step) * 2 + direction) * H + row] : 0.f;
      const float squashed = tanh_(cell);
      const float hidden = out_gradient[place * H + row]
          + (part[0][row] + part[1][row]) + (part[2][row] + part[3][row]);
      const float c = cell_gradient + hidden * open * (1.f - squashed * squashed);
      delta[row] = c * candidate * in * (1.f - in);
      delta[H + row] = c * previous * forget * (1.f - forget);
      delta[2 * H + row] = c * in * (1.f - candidate * candidate);
      delta[3 * H + row] = hidden * squashed * open * (1.f - open);
      cell_gradient = c * forget;
    }
    __syncthreads();
    projected_gradient[place * 4 * H + row] = delta[row];
    const float4* d = reinterpret_cast<const float4*>(delta + kind * H);
    float sum0 = 0.f, sum1 = 0.f, sum2 = 0.f, sum3 = 0.f;
#pragma unroll
    for (int k = 0; k < H / 4; ++k) {
      const float4 v = d[k];
      sum0 += weight[4 * k] * v.x;
      sum1 += weight[4 * k + 1] * v.y;
      sum2 += weight[4 * k + 2] * v.z;
      sum3 += weight[4 * k + 3] * v.w;
    }
    part[kind][unit] = (sum0 + sum1) + (sum2 + sum3);
    __syncthreads();
  }
}
"""


@cache
def available() -> bool:
    """Whether the kernels can run: a CUDA device, and CuPy to compile them."""
    return bool(torch.cuda.is_available()) and find_spec("cupy") is not None


@cache
def _kernels(hidden: int) -> tuple[Any, Any]:
    cupy: Any = import_module("cupy")

    names = (f"lstm_forward<{hidden}>", f"lstm_backward<{hidden}>")
    module = cupy.RawModule(code=SOURCE, options=("--std=c++17",), name_expressions=names)
    return module.get_function(names[0]), module.get_function(names[1])


def _launch(kernel: Any, sequences: int, hidden: int, *tensors: Any) -> None:
    cupy: Any = import_module("cupy")

    stream = torch.cuda.current_stream().cuda_stream
    with cupy.cuda.ExternalStream(stream):
        kernel((sequences, 2), (4 * hidden,), tuple(tensor.data_ptr() for tensor in tensors))


class _BidirectionalLstm(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, x: Any, inputs: Any, recurrent: Any, bias: Any, offsets: Any) -> Any:
        hidden, count = recurrent.shape[-1], x.shape[0]
        x, recurrent = x.contiguous(), recurrent.contiguous()
        projected = torch.addmm(bias, x, inputs.t())
        out = x.new_empty(count, 2 * hidden)
        gates = x.new_empty(count, 2, 4 * hidden)
        cells, before = x.new_empty(2, count, 2, hidden)
        forward, _ = _kernels(hidden)
        _launch(forward, len(offsets) - 1, hidden, projected, recurrent, offsets, out, gates, cells, before)
        context.save_for_backward(x, inputs, recurrent, offsets, gates, cells, before)
        return out

    @staticmethod
    def backward(context: Any, out_gradient: Any) -> Any:
        x, inputs, recurrent, offsets, gates, cells, before = context.saved_tensors
        hidden, count = recurrent.shape[-1], x.shape[0]
        gradient = x.new_empty(count, 2, 4 * hidden)
        _, backward = _kernels(hidden)
        _launch(
            backward, len(offsets) - 1, hidden, out_gradient.contiguous(), recurrent, offsets, gates, cells, gradient
        )
        flat = gradient.view(count, 8 * hidden)
        recurrent_gradient = torch.bmm(gradient.permute(1, 2, 0), before.transpose(0, 1))
        return flat @ inputs, flat.t() @ x, recurrent_gradient, flat.sum(0), None


def bidirectional_lstm(x: Any, inputs: Any, recurrent: Any, bias: Any, offsets: Any) -> Any:
    """Run one bidirectional layer over flat sequences; every initial state is zero.

    Args:
        x: float32 [n, features] on a CUDA device, the tokens of all sequences one after another.
        inputs: float32 [8 * hidden, features], both directions' input matrices.
        recurrent: float32 [2, 4 * hidden, hidden]; hidden a multiple of 4, at most 104.
        bias: float32 [8 * hidden], input and recurrent biases added up.
        offsets: int32 [sequences + 1] on the device; the longest sequences are best put first.

    Returns:
        float32 [n, 2 * hidden], forward states before backward states.
    """
    hidden = recurrent.shape[-1]
    if hidden % 4 or hidden > _MAX_HIDDEN:
        raise ValueError(f"the kernels take hidden sizes that are multiples of 4 up to {_MAX_HIDDEN}, not {hidden}")
    return _BidirectionalLstm.apply(x, inputs, recurrent, bias, offsets)
