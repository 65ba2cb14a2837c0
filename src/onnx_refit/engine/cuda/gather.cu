// Many tensors at once: one block a piece of one of them. Included by NVRTC at run time.

struct Piece {
  unsigned int tensor, nbytes;      // which source; how much of it
  unsigned long long from, to;      // bytes from the source's beginning; bytes from the destination's
};

__device__ __forceinline__ bool exponent_full(unsigned int word, int kind) {
  // A float is NaN or infinite if and only if all bits of its exponent are set.
  switch (kind) {
    case 1: return (word & 0x7f800000u) == 0x7f800000u;                                         // float32
    case 2: return (word & 0x7c00u) == 0x7c00u || (word & 0x7c000000u) == 0x7c000000u;          // two float16
    case 3: return (word & 0x7f80u) == 0x7f80u || (word & 0x7f800000u) == 0x7f800000u;          // two bfloat16
    default: return false;
  }
}

// Sources may lie anywhere the device can read (its own memory, pinned host memory), on 16-byte boundaries.
extern "C" __global__ __launch_bounds__(256) void gather(
    const unsigned long long* __restrict__ sources, const Piece* __restrict__ pieces, unsigned char* __restrict__ out) {
  const Piece p = pieces[blockIdx.x];
  const uint4* from = reinterpret_cast<const uint4*>(sources[p.tensor] + p.from);
  uint4* to = reinterpret_cast<uint4*>(out + p.to);
  const unsigned int n = p.nbytes / 16, step = blockDim.x;
  unsigned int i = threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = __ldcs(from + i + k * step);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[i + k * step] = v[k];
  }
  for (; i < n; i += step) to[i] = __ldcs(from + i);
  const unsigned char* rest = reinterpret_cast<const unsigned char*>(from + n);
  for (unsigned int k = threadIdx.x; k < p.nbytes % 16; k += step) reinterpret_cast<unsigned char*>(to + n)[k] = rest[k];
}
