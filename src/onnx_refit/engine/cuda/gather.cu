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

// flags[tensor] becomes 1 where an element is NaN or infinite; kinds[tensor]: see exponent_full, 4 is float64.
extern "C" __global__ __launch_bounds__(256) void look(
    const unsigned long long* __restrict__ sources, const Piece* __restrict__ pieces, const int* __restrict__ kinds,
    int* __restrict__ flags) {
  const Piece p = pieces[blockIdx.x];
  const int kind = kinds[p.tensor];
  if (kind == 0) return;
  const unsigned char* from = reinterpret_cast<const unsigned char*>(sources[p.tensor] + p.from);
  const unsigned int n = p.nbytes / 16;
  bool bad = false;
  const uint4* words = reinterpret_cast<const uint4*>(from);
  for (unsigned int i = threadIdx.x; i < n; i += blockDim.x) {
    const uint4 v = __ldg(words + i);
    if (kind == 4) {
      bad |= (v.y & 0x7ff00000u) == 0x7ff00000u || (v.w & 0x7ff00000u) == 0x7ff00000u;
    } else {
      bad |= exponent_full(v.x, kind) || exponent_full(v.y, kind) || exponent_full(v.z, kind) || exponent_full(v.w, kind);
    }
  }
  // What is left is less than 16 bytes: by elements.
  if (threadIdx.x == 0) {
    const unsigned int begin = n * 16;
    if (kind == 4) {
      for (unsigned int k = begin; k + 8 <= p.nbytes; k += 8)
        bad |= (reinterpret_cast<const unsigned int*>(from + k)[1] & 0x7ff00000u) == 0x7ff00000u;
    } else if (kind == 1) {
      for (unsigned int k = begin; k + 4 <= p.nbytes; k += 4)
        bad |= exponent_full(*reinterpret_cast<const unsigned int*>(from + k), 1);
    } else {
      for (unsigned int k = begin; k + 2 <= p.nbytes; k += 2)
        bad |= exponent_full(*reinterpret_cast<const unsigned short*>(from + k), kind);
    }
  }
  if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(flags + p.tensor, 1);
}

// Element positions[32 * tensor + k] of each tensor, as bytes, to out[(32 * tensor + k) * 8]; -1 is none.
extern "C" __global__ void pick(
    const unsigned long long* __restrict__ sources, const int* __restrict__ itemsizes,
    const long long* __restrict__ positions, unsigned char* __restrict__ out) {
  const int place = blockIdx.x * 32 + threadIdx.x;
  const long long position = positions[place];
  if (position < 0) return;
  const int size = itemsizes[blockIdx.x];
  const unsigned char* from = reinterpret_cast<const unsigned char*>(sources[blockIdx.x]) + position * size;
  for (int k = 0; k < size; ++k) out[(size_t)place * 8 + k] = from[k];
}
