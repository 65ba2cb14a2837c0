// Recurrent layers by a cluster of thread blocks a direction and batch element (compute capability 9.0 and later).
// Each block owns some hidden units and sends their new state straight into the other blocks' shared memory; a block's
// barrier opens when all bytes of the state have arrived, so no block waits for more than that.

__device__ __forceinline__ unsigned int shared_address(const void* p) { return (unsigned int)__cvta_generic_to_shared(p); }

__device__ __forceinline__ unsigned int remote_address(unsigned int local, int rank) {
  unsigned int there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(local), "r"(rank));
  return there;
}

__device__ __forceinline__ void barrier_init(unsigned int barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned int barrier, unsigned int nbytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(nbytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned int barrier, unsigned int parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void send(unsigned int address, float value, unsigned int barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
               "r"(__float_as_uint(value)), "r"(barrier) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The state of a cluster's blocks: two copies in turn in each block, and a barrier for each that counts bytes arriving.
template <int H, int PADDED, int LANES, int BLOCKS>
struct Exchange {
  static constexpr int SENDS = (BLOCKS + LANES - 1) / LANES;
  unsigned int bar[2], there[SENDS][2], bar_there[SENDS][2];

  __device__ __forceinline__ void begin(float (*h)[PADDED], unsigned long long* bars, int unit, int lane) {
    for (int p = 0; p < 2; ++p) bar[p] = shared_address(bars + p);
    if (threadIdx.x == 0) {
      for (int p = 0; p < 2; ++p) barrier_init(bar[p]);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      for (int p = 0; p < 2; ++p) barrier_expect(bar[p], 4 * H);
    }
#pragma unroll
    for (int k = 0; k < SENDS; ++k) {
      const int target = lane + k * LANES < BLOCKS ? lane + k * LANES : 0;
      for (int p = 0; p < 2; ++p) {
        there[k][p] = remote_address(shared_address(&h[p][unit]), target);
        bar_there[k][p] = remote_address(bar[p], target);
      }
    }
    cluster_sync();
  }

  // Wait for the whole state of step s. No block can be two steps ahead: it needs all units of the step before.
  __device__ __forceinline__ void receive(int s, int cur) {
    if (s == 0) return;
    barrier_wait(bar[cur], ((s - (cur ? 1 : 2)) / 2) & 1);
    if (threadIdx.x == 0) barrier_expect(bar[cur], 4 * H);
  }

  // The lanes of a unit pass its new state on, each to some blocks.
  __device__ __forceinline__ void pass_on(float v, int lane, int next) const {
#pragma unroll
    for (int k = 0; k < SENDS; ++k)
      if (lane + k * LANES < BLOCKS) send(there[k][next], v, bar_there[k][next]);
  }
};

#define KERNEL(H, LANES, BLOCKS) \
  __global__ __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(((H + BLOCKS - 1) / BLOCKS * LANES + 31) / 32 * 32, 1) void

template <int H, int LANES, int BLOCKS>
KERNEL(H, LANES, BLOCKS) lstm_cluster(
    const float* __restrict__ xp,    // [T, B, D, 4H] projection of the inputs; gates i o f c
    const float* __restrict__ R,     // [D, 4H, H]
    const float* __restrict__ bias,  // [D, 2, 4H] of the inputs and of the state, or null
    const float* __restrict__ h0,    // [D, B, H] or null
    const float* __restrict__ c0,    // [D, B, H] or null
    float* __restrict__ y,           // [T, D, B, H]
    float* __restrict__ hn,          // [D, B, H]
    float* __restrict__ cn,          // [D, B, H]
    int T, int B, int D, int backwards) {  // bit d of backwards: direction d walks from the end
  typedef Slice<H, LANES, 4> Rows;
  constexpr int OWN = (H + BLOCKS - 1) / BLOCKS, PADDED = (Rows::PADDED + 3) / 4 * 4;
  __shared__ __align__(16) float h[2][PADDED];
  __shared__ __align__(8) unsigned long long bars[2];
  const int d = blockIdx.x / BLOCKS, rank = blockIdx.x % BLOCKS, b = blockIdx.y, lane = threadIdx.x % LANES;
  const int local = threadIdx.x / LANES;
  const bool real = local < OWN && rank * OWN + local < H;
  const int unit = real ? rank * OWN + local : H - 1, gate = gate_of(lane);
  Rows rows;
  rows.load(R + (size_t)d * 4 * H * H, unit, lane);
  for (int k = threadIdx.x; k < 2 * PADDED; k += blockDim.x)
    (&h[0][0])[k] = h0 && k < H ? h0[((size_t)d * B + b) * H + k] : 0.f;
  __syncthreads();
  const Walk walk(xp, y, H, 4, T, B, D, d, b, unit, gate, backwards);
  const size_t state = walk.state;
  const ptrdiff_t row = walk.row, out = walk.out;
  const float* x = walk.x;
  float* to = walk.to;
  float c = c0 ? c0[state] : 0.f, v = h0 ? h0[state] : 0.f;
  // Two steps' projections are always on their way.
  float x0 = T > 0 ? x[0] : 0.f, x1 = T > 1 ? x[row] : 0.f;
  const int base = (threadIdx.x & 31) & ~(LANES - 1);
  const float constant = lstm_bias(bias, H, d, gate, unit);
  Exchange<H, PADDED, LANES, BLOCKS> exchange;
  exchange.begin(h, bars, unit, lane);
  auto step = [&](int s, int cur) {
    const float xt = x0 + constant;
    x0 = x1;
    if (s + 2 < T) x1 = x[2 * row];
    x += row;
    exchange.receive(s, cur);
    float a[4];
    rows.dot(h[cur], lane, a);
    v = lstm_step(own_gate<LANES>(a, lane) + xt, gate, base, c);
    if (real && s + 1 < T) exchange.pass_on(v, lane, cur ^ 1);
    if (real && lane == LANES - 1) *to = v;
    to += out;
  };
  // A warp without a unit would fall behind unnoticed: it stays out.
  if (__any_sync(0xffffffffu, real)) {
    int s = 0;
    for (; s + 1 < T; s += 2) {
      step(s, 0);
      step(s + 1, 1);
    }
    if (s < T) step(s, 0);
  }
  if (real && lane == 0) {
    hn[state] = v;
    cn[state] = c;
  }
  cluster_sync();  // no block may leave while others write to its memory
}

template <int H, int LANES, int BLOCKS>
KERNEL(H, LANES, BLOCKS) gru_cluster(
    const float* __restrict__ xp,    // [T, B, D, 3H] projection of the inputs; gates z r h
    const float* __restrict__ R,     // [D, 3H, H]
    const float* __restrict__ bias,  // [D, 2, 3H] of the inputs and of the state, or null
    const float* __restrict__ h0,    // [D, B, H] or null
    const float* __restrict__ c0,    // unused
    float* __restrict__ y,           // [T, D, B, H]
    float* __restrict__ hn,          // [D, B, H]
    float* __restrict__ cn,          // unused
    int T, int B, int D, int backwards) {
  typedef Slice<H, LANES, 3> Rows;
  constexpr int OWN = (H + BLOCKS - 1) / BLOCKS, PADDED = (Rows::PADDED + 3) / 4 * 4;
  __shared__ __align__(16) float h[2][PADDED];
  __shared__ __align__(8) unsigned long long bars[2];
  const int d = blockIdx.x / BLOCKS, rank = blockIdx.x % BLOCKS, b = blockIdx.y, lane = threadIdx.x % LANES;
  const int local = threadIdx.x / LANES;
  const bool real = local < OWN && rank * OWN + local < H;
  const int unit = real ? rank * OWN + local : H - 1;
  Rows rows;
  rows.load(R + (size_t)d * 3 * H * H, unit, lane);
  for (int k = threadIdx.x; k < 2 * PADDED; k += blockDim.x)
    (&h[0][0])[k] = h0 && k < H ? h0[((size_t)d * B + b) * H + k] : 0.f;
  __syncthreads();
  const Walk walk(xp, y, H, 3, T, B, D, d, b, unit, 0, backwards);
  const size_t state = walk.state;
  const ptrdiff_t row = walk.row, out = walk.out;
  const float* x = walk.x;
  float* to = walk.to;
  float v = h0 ? h0[state] : 0.f;
  const GruBias constant(bias + (size_t)d * 6 * H + unit, H, bias != nullptr);
  GruAhead ahead(x, row, H, T);
  Exchange<H, PADDED, LANES, BLOCKS> exchange;
  exchange.begin(h, bars, unit, lane);
  auto step = [&](int s, int cur) {
    float xt[3], a[3];
    ahead.take(x, row, H, s, T, xt);
    x += row;
    exchange.receive(s, cur);
    rows.dot(h[cur], lane, a);
    all_gates<LANES>(a);
    v = gru_step(xt, a, constant, v);
    if (real && s + 1 < T) exchange.pass_on(v, lane, cur ^ 1);
    if (real && lane == LANES - 1) *to = v;
    to += out;
  };
  if (__any_sync(0xffffffffu, real)) {
    int s = 0;
    for (; s + 1 < T; s += 2) {
      step(s, 0);
      step(s + 1, 1);
    }
    if (s < T) step(s, 0);
  }
  if (real && lane == 0) hn[state] = v;
  cluster_sync();
}
