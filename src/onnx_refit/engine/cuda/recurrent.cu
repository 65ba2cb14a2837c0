// Recurrent layers by one thread block a direction and batch element: one barrier a step.

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
  const int gate = gate_of(lane);
  Rows rows;
  rows.load(R + (size_t)d * 4 * H * H, unit, lane);
  for (int k = threadIdx.x; k < 2 * ((Rows::PADDED + 3) / 4 * 4); k += blockDim.x) (&h[0][0])[k] = 0.f;
  __syncthreads();
  const Walk walk(xp, y, H, 4, T, B, D, d, b, unit, gate, backwards);
  const size_t state = walk.state;
  const ptrdiff_t row = walk.row, out = walk.out;
  const float* x = walk.x;
  float* to = walk.to;
  float c = c0 ? c0[state] : 0.f, v = h0 ? h0[state] : 0.f;
  const bool writer = real && lane == 0;
  if (writer) h[0][unit] = v;
  // Two steps' projections are always on their way.
  float x0 = T > 0 ? x[0] : 0.f, x1 = T > 1 ? x[row] : 0.f;
  const int base = (threadIdx.x & 31) & ~(LANES - 1);
  const float constant = lstm_bias(bias, H, d, gate, unit);
  __syncthreads();
  int cur = 0;
  for (int s = 0; s < T; ++s) {
    const float xt = x0;
    x0 = x1;
    if (s + 2 < T) x1 = x[2 * row];
    x += row;
    float a[4];
    rows.dot(h[cur], lane, a);
    v = lstm_step(own_gate<LANES>(a, lane) + xt + constant, gate, base, c);
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
  const Walk walk(xp, y, H, 3, T, B, D, d, b, unit, 0, backwards);
  const size_t state = walk.state;
  const ptrdiff_t row = walk.row, out = walk.out;
  const float* x = walk.x;
  float* to = walk.to;
  float v = h0 ? h0[state] : 0.f;
  const GruBias constant(bias + (size_t)d * 6 * H + unit, H, bias != nullptr);
  const bool writer = real && lane == 0;
  if (writer) h[0][unit] = v;
  GruAhead ahead(x, row, H, T);
  __syncthreads();
  int cur = 0;
  for (int s = 0; s < T; ++s) {
    float xt[3], a[3];
    ahead.take(x, row, H, s, T, xt);
    x += row;
    rows.dot(h[cur], lane, a);
    all_gates<LANES>(a);
    v = gru_step(xt, a, constant, v);
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
