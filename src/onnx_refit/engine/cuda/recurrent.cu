// Recurrent layers by one thread block a direction and batch element; a thread keeps one gate row of R in registers.
// Included by NVRTC at run time; the sizes are template parameters, so that rows are unrolled.

__device__ __forceinline__ float sigmoid(float a) { return 1.f / (1.f + __expf(-a)); }
__device__ __forceinline__ float hyperbolic(float a) { return 1.f - 2.f / (1.f + __expf(2.f * a)); }

template <int H>
__device__ __forceinline__ void load_row(const float* __restrict__ row, float (&r)[H]) {
  const float4* rows = reinterpret_cast<const float4*>(row);
#pragma unroll
  for (int k = 0; k < H / 4; ++k) {
    const float4 v = rows[k];
    r[4 * k] = v.x; r[4 * k + 1] = v.y; r[4 * k + 2] = v.z; r[4 * k + 3] = v.w;
  }
}

template <int H>
__device__ __forceinline__ float dot(const float (&r)[H], const float* h) {
  // Four sums, so that additions do not wait for each other.
  float a0 = 0.f, a1 = 0.f, a2 = 0.f, a3 = 0.f;
  const float4* hv = reinterpret_cast<const float4*>(h);
#pragma unroll
  for (int k = 0; k < H / 4; ++k) {
    const float4 v = hv[k];
    a0 += r[4 * k] * v.x; a1 += r[4 * k + 1] * v.y; a2 += r[4 * k + 2] * v.z; a3 += r[4 * k + 3] * v.w;
  }
  return (a0 + a1) + (a2 + a3);
}

template <int H>
__global__ __launch_bounds__(4 * H, 1) void lstm(
    const float* __restrict__ xp,   // [T, B, D, 4H] projection and both biases; gates i o f c
    const float* __restrict__ R,    // [D, 4H, H]
    const float* __restrict__ rb,   // unused
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
  load_row<H>(R + ((size_t)d * 4 * H + g) * H, r);
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
    const float xt = x;
    // The next step's projection is on its way while this step computes.
    if (s + 1 < T) x = xp[((size_t)(t + step) * B + b) * row + (size_t)d * 4 * H + g];
    const float a = xt + dot<H>(r, h[cur]);
    gate[g] = g < 3 * H ? sigmoid(a) : hyperbolic(a);
    __syncthreads();
    if (g < H) {
      c = gate[2 * H + g] * c + gate[g] * gate[3 * H + g];
      const float v = gate[H + g] * hyperbolic(c);
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

template <int H>
__global__ __launch_bounds__(3 * H, 1) void gru(
    const float* __restrict__ xp,   // [T, B, D, 3H] projection, both biases of z and r, the input bias of h
    const float* __restrict__ R,    // [D, 3H, H]; gates z r h
    const float* __restrict__ rb,   // [D, H] recurrent bias of h
    const float* __restrict__ h0,   // [D, B, H] or null
    const float* __restrict__ c0,   // unused
    float* __restrict__ y,          // [T, D, B, H]
    float* __restrict__ hn,         // [D, B, H]
    float* __restrict__ cn,         // unused
    int T, int B, int D, int backwards) {
  const int d = blockIdx.x, b = blockIdx.y, g = threadIdx.x;
  __shared__ __align__(16) float h[2][H];
  __shared__ float gate[3 * H];
  __shared__ float candidate[H];
  float r[H];
  load_row<H>(R + ((size_t)d * 3 * H + g) * H, r);
  const size_t state = ((size_t)d * B + b) * H;
  if (g < H) h[0][g] = h0 ? h0[state + g] : 0.f;
  const float bias = g >= 2 * H ? rb[(size_t)d * H + g - 2 * H] : 0.f;
  const bool back = (backwards >> d) & 1;
  const int step = back ? -1 : 1;
  int t = back ? T - 1 : 0;
  const size_t row = (size_t)D * 3 * H;
  float x = T > 0 ? xp[((size_t)t * B + b) * row + (size_t)d * 3 * H + g] : 0.f;
  __syncthreads();
  int cur = 0;
  for (int s = 0; s < T; ++s, t += step) {
    const float xt = x;
    if (s + 1 < T) x = xp[((size_t)(t + step) * B + b) * row + (size_t)d * 3 * H + g];
    const float a = dot<H>(r, h[cur]);
    if (g < 2 * H) {
      gate[g] = sigmoid(xt + a);
    } else {
      gate[g] = a + bias;
      candidate[g - 2 * H] = xt;
    }
    __syncthreads();
    if (g < H) {
      const float z = gate[g];
      const float v = (1.f - z) * hyperbolic(candidate[g] + gate[H + g] * gate[2 * H + g]) + z * h[cur][g];
      h[cur ^ 1][g] = v;
      y[(((size_t)t * D + d) * B + b) * H + g] = v;
    }
    cur ^= 1;
    __syncthreads();
  }
  if (g < H) hn[state + g] = h[cur][g];
}
