// A float32 as a float16 (kind 1) or a bfloat16 (kind 2): rounded to nearest, ties to even. What would become infinite
// becomes the largest number; what is infinite or NaN stays so.
__device__ __forceinline__ unsigned int half_bits(unsigned int word, int kind) {
  const bool finite = (word & 0x7f800000u) != 0x7f800000u;
  if (kind == 1) {
    unsigned short bits;
    float value = __uint_as_float(word);
    if (finite) value = fminf(fmaxf(value, -65504.f), 65504.f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
  if (!finite) return word & 0x007fffffu ? 0x7fffu : word >> 16;
  const unsigned int rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  return (rounded & 0x7fffu) == 0x7f80u ? (rounded & 0x8000u) | 0x7f7fu : rounded;
}
