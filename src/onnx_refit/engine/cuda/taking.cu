// Source weights that lie on the device, taken in one pass: copied or cast to where they are wanted, looked at for NaN
// and infinities on the way, and a few elements of each compared with those of the weights before. Read after gather.cu and halves.cu.

struct Part {
  unsigned int tensor, nbytes;          // which source; how much of it
  unsigned long long from, to, keep;    // bytes from the source's beginning; in the weights; in what is kept (~0: not)
  unsigned long long cast;              // 0 as it is, 1 to float16, 2 to bfloat16 (of float32)
};

// What the host looks at afterwards, in its own memory: written only where there is something to say.
enum { NOT_FINITE, CHANGED_BY_CAST, ALIKE, EACH };

__device__ __forceinline__ bool infinite(const uint4& v, int kind) {
  if (kind == 4) return (v.y & 0x7ff00000u) == 0x7ff00000u || (v.w & 0x7ff00000u) == 0x7ff00000u;
  return exponent_full(v.x, kind) || exponent_full(v.y, kind) || exponent_full(v.z, kind) || exponent_full(v.w, kind);
}

__device__ __forceinline__ void put(uint4 v, unsigned char* to, int cast) {
  if (!cast) {
    *reinterpret_cast<uint4*>(to) = v;
    return;
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(half_bits(v.x, cast) | (half_bits(v.y, cast) << 16),
                                             half_bits(v.z, cast) | (half_bits(v.w, cast) << 16));
}

// The elements positions[32 * tensor + k], as bytes, beside those of the version before, at row rows[tensor].
__device__ __forceinline__ void compare_samples(
    long long tensor, const unsigned long long* sources, const int* itemsizes, const int* rows,
    const long long* positions, const unsigned long long* before, unsigned long long* after, volatile int* found) {
  const int lane = threadIdx.x % 32;
  const long long position = positions[tensor * 32 + lane];
  bool differs = false;
  if (position >= 0) {
    const unsigned long long at = sources[tensor];
    unsigned long long value = 0;
    switch (itemsizes[tensor]) {
      case 1: value = reinterpret_cast<const unsigned char*>(at)[position]; break;
      case 2: value = reinterpret_cast<const unsigned short*>(at)[position]; break;
      case 4: value = reinterpret_cast<const unsigned int*>(at)[position]; break;
      default: value = reinterpret_cast<const unsigned long long*>(at)[position];
    }
    const long long place = (long long)rows[tensor] * 32 + lane;
    after[place] = value;
    differs = value != before[place];
  }
  if (!__any_sync(0xffffffffu, differs) && lane == 0) {
    found[ALIKE] = 1;
    found[EACH + tensor] = 1;
  }
}

extern "C" __global__ __launch_bounds__(256) void take(
    const unsigned long long* __restrict__ sources, const Part* __restrict__ parts, const int* __restrict__ kinds,
    const int* __restrict__ itemsizes, const int* __restrict__ rows, const long long* __restrict__ positions,
    long long tensors, int* found, const unsigned long long* __restrict__ before, unsigned long long* __restrict__ after,
    unsigned char* __restrict__ weights, unsigned char* __restrict__ kept) {
  const unsigned int samplers = (unsigned int)((tensors + 7) / 8);
  if (blockIdx.x < samplers) {
    const long long tensor = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (tensor < tensors) compare_samples(tensor, sources, itemsizes, rows, positions, before, after, found);
    return;
  }
  const Part p = parts[blockIdx.x - samplers];
  const int kind = kinds[p.tensor], cast = (int)p.cast;
  const unsigned char* from = reinterpret_cast<const unsigned char*>(sources[p.tensor] + p.from);
  unsigned char* to = p.to == ~0ull ? nullptr : weights + p.to;
  unsigned char* keep = p.keep == ~0ull ? nullptr : kept + p.keep;
  const uint4* words = reinterpret_cast<const uint4*>(from);
  const unsigned int n = p.nbytes / 16, step = blockDim.x, width = cast ? 8 : 16;
  bool bad = false;
  unsigned int i = threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = __ldcs(words + i + k * step);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      bad |= infinite(v[k], kind);
      if (to) put(v[k], to + (size_t)width * (i + k * step), cast);
      if (keep) reinterpret_cast<uint4*>(keep)[i + k * step] = v[k];
    }
  }
  for (; i < n; i += step) {
    const uint4 v = __ldcs(words + i);
    bad |= infinite(v, kind);
    if (to) put(v, to + (size_t)width * i, cast);
    if (keep) reinterpret_cast<uint4*>(keep)[i] = v;
  }
  // What is left is less than 16 bytes: by elements.
  if (threadIdx.x == 0) {
    for (unsigned int k = 16 * n; k < p.nbytes; ++k) {
      if (to && !cast) to[k] = from[k];
      if (keep) keep[k] = from[k];
    }
    const unsigned int wide = kind == 4 ? 8 : kind == 1 ? 4 : 2;
    for (unsigned int k = 16 * n; kind && k + wide <= p.nbytes; k += wide) {
      if (kind == 4) {
        bad |= (reinterpret_cast<const unsigned int*>(from + k)[1] & 0x7ff00000u) == 0x7ff00000u;
      } else if (kind == 1) {
        const unsigned int word = *reinterpret_cast<const unsigned int*>(from + k);
        bad |= exponent_full(word, 1);
        if (to && cast) *reinterpret_cast<unsigned short*>(to + k / 2) = (unsigned short)half_bits(word, cast);
      } else {
        bad |= exponent_full(*reinterpret_cast<const unsigned short*>(from + k), kind);
      }
    }
  }
  if (bad) *reinterpret_cast<volatile int*>(found + NOT_FINITE) = 1;
}

struct Conversion {
  unsigned long long to;                 // bytes from the destination's beginning
  unsigned int source, target;           // kinds: 1 float32, 2 float16, 3 bfloat16, 4 float64; 16 + bytes as they are
  unsigned int sizes[4];                 // what is walked, last dimension fastest
  long long strides[4];                  // of the source, in elements
};

struct Stretch { unsigned int conversion, begin, count, unused; };

__device__ __forceinline__ double read_number(unsigned long long at, int kind, long long i) {
  if (kind == 1) return reinterpret_cast<const float*>(at)[i];
  if (kind == 4) return reinterpret_cast<const double*>(at)[i];
  const unsigned short bits = reinterpret_cast<const unsigned short*>(at)[i];
  float value;
  if (kind == 2) {
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  } else {
    value = __uint_as_float((unsigned int)bits << 16);
  }
  return value;
}

// Writes a number; gives back what was written. Halves come from numbers that are floats: they are rounded once.
__device__ __forceinline__ double write_number(unsigned char* at, int kind, double value) {
  if (kind == 4) {
    *reinterpret_cast<double*>(at) = value;
    return value;
  }
  const float single = (float)value;
  if (kind == 1) {
    *reinterpret_cast<float*>(at) = single;
    return single;
  }
  unsigned short bits;
  float back;
  if (kind == 2) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(single));
    asm("cvt.f32.f16 %0, %1;" : "=f"(back) : "h"(bits));
  } else {
    const unsigned int word = __float_as_uint(single);
    bits = (unsigned short)((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    back = __uint_as_float((unsigned int)bits << 16);
  }
  *reinterpret_cast<unsigned short*>(at) = bits;
  return back;
}

// Eight numbers side by side, of float32 and halves; where they lie allows wide loads.
__device__ __forceinline__ void read_eight(unsigned long long at, int kind, unsigned int i, float* v) {
  if (kind == 1) {
    const float4* from = reinterpret_cast<const float4*>(at) + i / 4;
    const float4 a = __ldcs(from), b = __ldcs(from + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
  const uint4 w = __ldcs(reinterpret_cast<const uint4*>(at) + i / 8);
  const unsigned int words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const unsigned short bits = (unsigned short)(words[k / 2] >> (16 * (k % 2)));
    if (kind == 2) {
      asm("cvt.f32.f16 %0, %1;" : "=f"(v[k]) : "h"(bits));
    } else {
      v[k] = __uint_as_float((unsigned int)bits << 16);
    }
  }
}

// Writes them; v becomes what was written.
__device__ __forceinline__ void write_eight(unsigned char* to, int kind, unsigned int i, float* v) {
  if (kind == 1) {
    float4* there = reinterpret_cast<float4*>(to) + i / 4;
    there[0] = make_float4(v[0], v[1], v[2], v[3]);
    there[1] = make_float4(v[4], v[5], v[6], v[7]);
    return;
  }
  unsigned int words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    unsigned short bits;
    if (kind == 2) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v[k]));
      asm("cvt.f32.f16 %0, %1;" : "=f"(v[k]) : "h"(bits));
    } else {
      const unsigned int word = __float_as_uint(v[k]);
      bits = (unsigned short)((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
      v[k] = __uint_as_float((unsigned int)bits << 16);
    }
    words[k / 2] |= (unsigned int)bits << (16 * (k % 2));
  }
  reinterpret_cast<uint4*>(to)[i / 8] = make_uint4(words[0], words[1], words[2], words[3]);
}

// Tensors in any order of elements, and of other dtypes, to dense ones of the dtypes wanted.
extern "C" __global__ __launch_bounds__(256) void convert(
    const unsigned long long* __restrict__ sources, const Conversion* __restrict__ conversions,
    const Stretch* __restrict__ stretches, unsigned char* __restrict__ out, long long rounding, int* found) {
  const Stretch s = stretches[blockIdx.x];
  const Conversion c = conversions[s.conversion];
  const unsigned long long at = sources[s.conversion];
  bool bad = false, changed = false;
  unsigned int first = s.begin;
  if (c.sizes[0] * c.sizes[1] * c.sizes[2] == 1 && c.strides[3] == 1 && c.source <= 3 && c.target <= 3 && at % 16 == 0) {
    for (unsigned int k = threadIdx.x; k < s.count / 8; k += blockDim.x) {
      float v[8], was[8];
      read_eight(at, c.source, s.begin + 8 * k, v);
#pragma unroll
      for (int e = 0; e < 8; ++e) was[e] = v[e];
      write_eight(out + c.to, c.target, s.begin + 8 * k, v);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        bad |= !isfinite(was[e]);
        changed |= isfinite(was[e]) && (rounding ? !isfinite(v[e]) : v[e] != was[e]);
      }
    }
    first += s.count / 8 * 8;
  }
  for (unsigned int i = first + threadIdx.x; i < s.begin + s.count; i += blockDim.x) {
    unsigned int left = i;
    long long from = 0;
#pragma unroll
    for (int axis = 3; axis >= 0; --axis) {
      from += (long long)(left % c.sizes[axis]) * c.strides[axis];
      left /= c.sizes[axis];
    }
    unsigned char* to = out + c.to;
    if (c.source >= 16) {
      switch (c.source - 16) {
        case 1: to[i] = reinterpret_cast<const unsigned char*>(at)[from]; break;
        case 2: reinterpret_cast<unsigned short*>(to)[i] = reinterpret_cast<const unsigned short*>(at)[from]; break;
        case 4: reinterpret_cast<unsigned int*>(to)[i] = reinterpret_cast<const unsigned int*>(at)[from]; break;
        default: reinterpret_cast<unsigned long long*>(to)[i] = reinterpret_cast<const unsigned long long*>(at)[from];
      }
      continue;
    }
    const double value = read_number(at, c.source, from);
    const unsigned int size = c.target == 4 ? 8 : c.target == 1 ? 4 : 2;
    const double written = write_number(to + (size_t)i * size, c.target, value);
    bad |= !isfinite(value);
    changed |= isfinite(value) && (rounding ? !isfinite(written) : written != value);
  }
  if (bad) *reinterpret_cast<volatile int*>(found + NOT_FINITE) = 1;
  if (changed) *reinterpret_cast<volatile int*>(found + CHANGED_BY_CAST) = 1;
}

// differing[tensor], in the host's memory, becomes 1 where the bytes at two places are not the same.
extern "C" __global__ __launch_bounds__(256) void differ(
    const unsigned long long* __restrict__ left, const unsigned long long* __restrict__ right,
    const Piece* __restrict__ pieces, int* differing) {
  const Piece p = pieces[blockIdx.x];
  const unsigned char* one = reinterpret_cast<const unsigned char*>(left[p.tensor] + p.from);
  const unsigned char* other = reinterpret_cast<const unsigned char*>(right[p.tensor] + p.from);
  const unsigned int n = p.nbytes / 16;
  bool differs = false;
  for (unsigned int i = threadIdx.x; i < n; i += blockDim.x) {
    const uint4 a = reinterpret_cast<const uint4*>(one)[i], b = reinterpret_cast<const uint4*>(other)[i];
    differs |= a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w;
  }
  for (unsigned int k = 16 * n + threadIdx.x; k < p.nbytes; k += blockDim.x) differs |= one[k] != other[k];
  if (differs) *reinterpret_cast<volatile int*>(differing + p.tensor) = 1;
}
