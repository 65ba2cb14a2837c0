// Recurrent layers by one thread block a direction and batch element.
// LANES neighbouring threads share a hidden unit: each keeps a slice of the unit's rows of R in registers (all gates),
// so an element of the state is read once for all gates, and sums are exchanged by shuffles: one barrier a step.
// Compiled at run time; the sizes are template parameters, so that rows are unrolled.

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

template <int H, int LANES>
__global__ __launch_bounds__((H * LANES + 31) / 32 * 32, 1) void lstm(
    const float* __restrict__ xp,    // [T, B, D, 4H] projection of the inputs; gates i o f c
    const float* __restrict__ R,     // [D, 4H, H]
    const float* __restrict__ bias,  // [D, 2, 4H] of the inputs and of the state, or null
    const float* __restrict__ h0,   // [D, B, H] or null
    const float* __restrict__ c0,   // [D, B, H] or null
    float* __restrict__ y,          // [T, D, B, H]
    float* __restrict__ hn,         // [D, B, H]
    float* __restrict__ cn,         // [D, B, H]
    int T, int B, int D, int backwards) {  // bit d of backwards: direction d walks from the end
  typedef Slice<H, LANES, 4> Rows;
  __shared__ __align__(16) float h[2][(Rows::PADDED + 3) / 4 * 4];
  const int d = blockIdx.x, b = blockIdx.y, lane = threadIdx.x % LANES;
  const bool real = threadIdx.x < H * LANES;
  const int unit = real ? threadIdx.x / LANES : H - 1;
  const int gate = (lane & 1) * 2 + ((lane >> 1) & 1);
  Rows rows;
  rows.load(R + (size_t)d * 4 * H * H, unit, lane);
  for (int k = threadIdx.x; k < 2 * ((Rows::PADDED + 3) / 4 * 4); k += blockDim.x) (&h[0][0])[k] = 0.f;
  __syncthreads();
  const size_t state = ((size_t)d * B + b) * H + unit;
  float c = c0 ? c0[state] : 0.f, v = h0 ? h0[state] : 0.f;
  const bool writer = real && lane == 0;
  if (writer) h[0][unit] = v;
  const bool back = (backwards >> d) & 1;
  const int first = back ? T - 1 : 0;
  const ptrdiff_t row = (ptrdiff_t)B * D * 4 * H * (back ? -1 : 1);
  const float* x = xp + ((size_t)first * B + b) * D * 4 * H + (size_t)d * 4 * H + gate * H + unit;
  const ptrdiff_t out = (ptrdiff_t)D * B * H * (back ? -1 : 1);
  float* to = y + (((size_t)first * D + d) * B + b) * H + unit;
  // Two steps' projections are always on their way.
  float x0 = T > 0 ? x[0] : 0.f, x1 = T > 1 ? x[row] : 0.f;
  const int base = (threadIdx.x & 31) & ~(LANES - 1);
  const float* own = bias + (size_t)d * 8 * H + gate * H + unit;
  const float constant = bias ? own[0] + own[4 * H] : 0.f;
  __syncthreads();
  int cur = 0;
  for (int s = 0; s < T; ++s) {
    const float xt = x0;
    x0 = x1;
    if (s + 2 < T) x1 = x[2 * row];
    x += row;
    float a[4];
    rows.dot(h[cur], lane, a);
    // Each exchange halves what a lane keeps, until it holds one gate's whole sum.
    const bool odd = lane & 1, high = lane & 2;
    float k0 = odd ? a[2] : a[0], k1 = odd ? a[3] : a[1];
    k0 += __shfl_xor_sync(0xffffffffu, odd ? a[0] : a[2], 1);
    k1 += __shfl_xor_sync(0xffffffffu, odd ? a[1] : a[3], 1);
    float sum = high ? k1 : k0;
    sum += __shfl_xor_sync(0xffffffffu, high ? k0 : k1, 2);
#pragma unroll
    for (int far = 4; far < LANES; far *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
    sum += xt + constant;
    const float e = sigmoid(gate == 3 ? 2.f * sum : sum);
    const float act = gate == 3 ? 2.f * e - 1.f : e;
    const float i = __shfl_sync(0xffffffffu, act, base), f = __shfl_sync(0xffffffffu, act, base + 1);
    const float o = __shfl_sync(0xffffffffu, act, base + 2), g = __shfl_sync(0xffffffffu, act, base + 3);
    c = f * c + i * g;
    v = o * hyperbolic(c);
    cur ^= 1;
    if (writer) {
      h[cur][unit] = v;
      *to = v;
    }
    to += out;
    __syncthreads();
  }
  if (writer) {
    hn[state] = v;
    cn[state] = c;
  }
}

template <int H, int LANES>
__global__ __launch_bounds__((H * LANES + 31) / 32 * 32, 1) void gru(
    const float* __restrict__ xp,    // [T, B, D, 3H] projection of the inputs; gates z r h
    const float* __restrict__ R,     // [D, 3H, H]
    const float* __restrict__ bias,  // [D, 2, 3H] of the inputs and of the state, or null
    const float* __restrict__ h0,   // [D, B, H] or null
    const float* __restrict__ c0,   // unused
    float* __restrict__ y,          // [T, D, B, H]
    float* __restrict__ hn,         // [D, B, H]
    float* __restrict__ cn,         // unused
    int T, int B, int D, int backwards) {
  typedef Slice<H, LANES, 3> Rows;
  __shared__ __align__(16) float h[2][(Rows::PADDED + 3) / 4 * 4];
  const int d = blockIdx.x, b = blockIdx.y, lane = threadIdx.x % LANES;
  const bool real = threadIdx.x < H * LANES;
  const int unit = real ? threadIdx.x / LANES : H - 1;
  Rows rows;
  rows.load(R + (size_t)d * 3 * H * H, unit, lane);
  for (int k = threadIdx.x; k < 2 * ((Rows::PADDED + 3) / 4 * 4); k += blockDim.x) (&h[0][0])[k] = 0.f;
  __syncthreads();
  const size_t state = ((size_t)d * B + b) * H + unit;
  float v = h0 ? h0[state] : 0.f;
  const float* own = bias + (size_t)d * 6 * H + unit;
  const float zb = bias ? own[0] + own[3 * H] : 0.f, rb = bias ? own[H] + own[4 * H] : 0.f;
  const float nb = bias ? own[2 * H] : 0.f, hb = bias ? own[5 * H] : 0.f;
  const bool writer = real && lane == 0;
  if (writer) h[0][unit] = v;
  const bool back = (backwards >> d) & 1;
  const int first = back ? T - 1 : 0;
  const ptrdiff_t row = (ptrdiff_t)B * D * 3 * H * (back ? -1 : 1);
  const float* x = xp + ((size_t)first * B + b) * D * 3 * H + (size_t)d * 3 * H + unit;
  const ptrdiff_t out = (ptrdiff_t)D * B * H * (back ? -1 : 1);
  float* to = y + (((size_t)first * D + d) * B + b) * H + unit;
  float now[3], next[3];
#pragma unroll
  for (int g = 0; g < 3; ++g) {
    now[g] = T > 0 ? x[g * H] : 0.f;
    next[g] = T > 1 ? x[row + g * H] : 0.f;
  }
  __syncthreads();
  int cur = 0;
  for (int s = 0; s < T; ++s) {
    float xt[3], a[3];
#pragma unroll
    for (int g = 0; g < 3; ++g) {
      xt[g] = now[g];
      now[g] = next[g];
      if (s + 2 < T) next[g] = x[2 * row + g * H];
    }
    x += row;
    rows.dot(h[cur], lane, a);
#pragma unroll
    for (int far = 1; far < LANES; far *= 2)
#pragma unroll
      for (int g = 0; g < 3; ++g) a[g] += __shfl_xor_sync(0xffffffffu, a[g], far);
    const float z = sigmoid(xt[0] + zb + a[0]), reset = sigmoid(xt[1] + rb + a[1]);
    // The reset gate scales the recurrent part of the candidate, its bias included.
    v = (1.f - z) * hyperbolic(xt[2] + nb + reset * (a[2] + hb)) + z * v;
    cur ^= 1;
    if (writer) {
      h[cur][unit] = v;
      *to = v;
    }
    to += out;
    __syncthreads();
  }
  if (writer) hn[state] = v;
}
