// What the recurrent kernels share; put before each of them at run time, when sizes become template parameters.
// LANES neighbouring threads share a hidden unit: each keeps a slice of the unit's rows of R in registers (all gates),
// so an element of the state is read once for all gates, and sums are exchanged by shuffles.

__device__ __forceinline__ float sigmoid(float a) { return __fdividef(1.f, 1.f + __expf(-a)); }
__device__ __forceinline__ float hyperbolic(float a) { return 1.f - __fdividef(2.f, 1.f + __expf(2.f * a)); }

// A lane's share of a unit's rows: whole float4s of the state in turn with its neighbours, then single elements.
template <int H, int LANES, int GATES>
struct Slice {
  static constexpr int VECTORS = H / (4 * LANES);
  static constexpr int SINGLES = (H - VECTORS * 4 * LANES + LANES - 1) / LANES;
  static constexpr int PADDED = VECTORS * 4 * LANES + SINGLES * LANES;
  float r[GATES][VECTORS * 4 + SINGLES];

  __device__ __forceinline__ void load(const float* __restrict__ R, int unit, int lane) {
#pragma unroll
    for (int k = 0; k < VECTORS * 4 + SINGLES; ++k) {
      const int column = k < VECTORS * 4 ? ((k / 4) * LANES + lane) * 4 + k % 4
                                         : VECTORS * 4 * LANES + (k - VECTORS * 4) * LANES + lane;
#pragma unroll
      for (int g = 0; g < GATES; ++g) r[g][k] = column < H ? R[(g * H + unit) * H + column] : 0.f;
    }
  }

  __device__ __forceinline__ void dot(const float* h, int lane, float (&a)[GATES]) const {
#pragma unroll
    for (int g = 0; g < GATES; ++g) a[g] = 0.f;
    const float4* hv = reinterpret_cast<const float4*>(h);
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const float4 v = hv[k * LANES + lane];
#pragma unroll
      for (int g = 0; g < GATES; ++g) a[g] += r[g][4 * k] * v.x;
#pragma unroll
      for (int g = 0; g < GATES; ++g) a[g] += r[g][4 * k + 1] * v.y;
#pragma unroll
      for (int g = 0; g < GATES; ++g) a[g] += r[g][4 * k + 2] * v.z;
#pragma unroll
      for (int g = 0; g < GATES; ++g) a[g] += r[g][4 * k + 3] * v.w;
    }
#pragma unroll
    for (int k = 0; k < SINGLES; ++k) {
      const float v = h[VECTORS * 4 * LANES + k * LANES + lane];
#pragma unroll
      for (int g = 0; g < GATES; ++g) a[g] += r[g][4 * VECTORS + k] * v;
    }
  }
};

// Where a unit's steps read and write, and the way from one step to the next.
struct Walk {
  size_t state;        // of the unit, among all directions and batch elements
  ptrdiff_t row, out;  // from a step's projection to the next one's, from a step's output to the next one's
  const float* x;      // the first step's projection of the inputs, at the unit's gate
  float* to;           // the first step's output

  __device__ __forceinline__ Walk(
      const float* xp, float* y, int H, int gates, int T, int B, int D, int d, int b, int unit, int gate, int backwards) {
    const bool back = (backwards >> d) & 1;
    const int first = back ? T - 1 : 0;
    const size_t width = (size_t)gates * H;
    state = ((size_t)d * B + b) * H + unit;
    row = (ptrdiff_t)(B * D * width) * (back ? -1 : 1);
    out = (ptrdiff_t)D * B * H * (back ? -1 : 1);
    x = xp + ((size_t)first * B + b) * D * width + d * width + gate * H + unit;
    to = y + (((size_t)first * D + d) * B + b) * H + unit;
  }
};

// The bias of an LSTM's gate: of the inputs and of the state together.
__device__ __forceinline__ float lstm_bias(const float* bias, int H, int d, int gate, int unit) {
  const float* own = bias + (size_t)d * 8 * H + gate * H + unit;
  return bias ? own[0] + own[4 * H] : 0.f;
}

// The projections of a GRU's unit, of all gates: two steps' are always on their way.
struct GruAhead {
  float now[3], next[3];

  __device__ __forceinline__ GruAhead(const float* x, ptrdiff_t row, int H, int T) {
#pragma unroll
    for (int g = 0; g < 3; ++g) {
      now[g] = T > 0 ? x[g * H] : 0.f;
      next[g] = T > 1 ? x[row + g * H] : 0.f;
    }
  }

  // Those of step s, whose projections are at x.
  __device__ __forceinline__ void take(const float* x, ptrdiff_t row, int H, int s, int T, float (&xt)[3]) {
#pragma unroll
    for (int g = 0; g < 3; ++g) {
      xt[g] = now[g];
      now[g] = next[g];
      if (s + 2 < T) next[g] = x[2 * row + g * H];
    }
  }
};

// Sums of four gates over LANES neighbours: each exchange halves what a lane keeps, until it holds one gate's whole sum.
template <int LANES>
__device__ __forceinline__ float own_gate(const float (&a)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  float k0 = odd ? a[2] : a[0], k1 = odd ? a[3] : a[1];
  k0 += __shfl_xor_sync(0xffffffffu, odd ? a[0] : a[2], 1);
  k1 += __shfl_xor_sync(0xffffffffu, odd ? a[1] : a[3], 1);
  float sum = high ? k1 : k0;
  sum += __shfl_xor_sync(0xffffffffu, high ? k0 : k1, 2);
#pragma unroll
  for (int far = 4; far < LANES; far *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
  return sum;
}

__device__ __forceinline__ int gate_of(int lane) { return (lane & 1) * 2 + ((lane >> 1) & 1); }

// One LSTM step of a unit from the lane's own gate before its activation; every lane of the unit gets the new state.
__device__ __forceinline__ float lstm_step(float sum, int gate, int base, float& c) {
  const float e = sigmoid(gate == 3 ? 2.f * sum : sum);
  const float act = gate == 3 ? 2.f * e - 1.f : e;
  const float i = __shfl_sync(0xffffffffu, act, base), f = __shfl_sync(0xffffffffu, act, base + 1);
  const float o = __shfl_sync(0xffffffffu, act, base + 2), g = __shfl_sync(0xffffffffu, act, base + 3);
  c = f * c + i * g;
  return o * hyperbolic(c);
}

template <int LANES>
__device__ __forceinline__ void all_gates(float (&a)[3]) {
#pragma unroll
  for (int far = 1; far < LANES; far *= 2)
#pragma unroll
    for (int g = 0; g < 3; ++g) a[g] += __shfl_xor_sync(0xffffffffu, a[g], far);
}

// The biases of a GRU's unit: of z and r both, of the candidate one for the inputs and one for the state.
struct GruBias {
  float z, r, n, h;
  __device__ __forceinline__ GruBias(const float* own, int H, bool given) {
    z = given ? own[0] + own[3 * H] : 0.f;
    r = given ? own[H] + own[4 * H] : 0.f;
    n = given ? own[2 * H] : 0.f;
    h = given ? own[5 * H] : 0.f;
  }
};

// The reset gate scales the recurrent part of the candidate, its bias included.
__device__ __forceinline__ float gru_step(const float (&xt)[3], const float (&a)[3], const GruBias& b, float v) {
  const float z = sigmoid(xt[0] + b.z + a[0]), reset = sigmoid(xt[1] + b.r + a[1]);
  return (1.f - z) * hyperbolic(xt[2] + b.n + reset * (a[2] + b.h)) + z * v;
}
