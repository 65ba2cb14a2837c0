/* The two inner loops that move nearly all bytes, with registers as wide as a line of the cache (AVX-512).
 *
 * Included by moves.c, whose own loops do the same, to the bit, on other processors. With narrower registers a refit
 * waits for these loops and not for memory. What is read next is fetched meanwhile. ONNX_REFIT_NARROW, for tests, does
 * without.
 */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(ONNX_REFIT_NARROW)
#include <immintrin.h>
#define FULL __attribute__((target("avx512f,avx512bw")))

/* Of any address: nothing is read. */
static inline void prefetch(uintptr_t base, int64_t offset) {
    __builtin_prefetch((const void *)(base + (uintptr_t)offset));
}

/* Whether to use these here. */
static inline int has_wide(void) {
    static int known; /* 1 no, 2 yes; threads write the same */
    int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!found) {
        __builtin_cpu_init();
        found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? 2 : 1;
        __atomic_store_n(&known, found, __ATOMIC_RELAXED);
    }
    return found == 2;
}

/* Copies whole lines; whether all bits of `exponent` are set in any of their elements of 2 or 4 bytes. Where `past`,
 * the target begins with a line. */
FULL static int copy_lines(
    uint8_t *to, const uint8_t *from, size_t bytes, int64_t size, int64_t exponent, int past, const uint8_t *then) {
    __m512i mask = size == 4 ? _mm512_set1_epi32((int)exponent) : _mm512_set1_epi16((short)exponent);
    __mmask32 found = 0;
    uintptr_t behind = then ? (uintptr_t)then - bytes : (uintptr_t)from - FETCHED; /* or what has just been read */
    for (size_t i = 0; i < bytes; i += 64) {
        __m512i value = _mm512_loadu_si512(from + i), bits = _mm512_and_si512(value, mask);
        size_t ahead = i + FETCHED;
        prefetch(ahead < bytes ? (uintptr_t)from : behind, (int64_t)ahead);
        found |= size == 4 ? _mm512_cmpeq_epi32_mask(bits, mask) : _mm512_cmpeq_epi16_mask(bits, mask);
        if (past)
            _mm512_stream_si512((__m512i *)(void *)(to + i), value);
        else
            _mm512_storeu_si512(to + i, value);
    }
    return found != 0;
}

/* What `tiles` does for 16 columns, which `f` holds factors of, where there are any; whether all bits of `exponent`,
 * where it is not 0, are set in any element. */
FULL static int turn_lines(
    single *t, const single *s, const single *f, int64_t f_step, const tile *k, int past, word exponent,
    const single *then) {
    __m512i mask = _mm512_set1_epi32((int)exponent), lacking = mask;
    float factors[LANES] = {0};
    if (f)
        for (int j = 0; j < LANES; j++) factors[j] = f[j * f_step];
    __m512 by = _mm512_loadu_ps(factors);
    uintptr_t next = (uintptr_t)(then ? then : s);
    for (int64_t r = 0; r < k->run; r += LANES) {
        int count = k->run - r < LANES ? (int)(k->run - r) : LANES;
        __mmask16 there = (__mmask16)((1u << count) - 1);
        __m512 a[LANES], b[LANES];
        for (int i = 0; i < LANES; i++) {
            b[i] = _mm512_maskz_loadu_ps(there, s + r + i * k->s_step);
            prefetch(next, 4 * (r + i * k->s_step));
            /* Bits of the exponent that an element lacks: one that is not finite lacks none. */
            lacking = _mm512_min_epu32(lacking, _mm512_andnot_si512(_mm512_castps_si512(b[i]), mask));
        }
        for (int i = 0; i < LANES; i += 2) {
            a[i] = _mm512_unpacklo_ps(b[i], b[i + 1]);
            a[i + 1] = _mm512_unpackhi_ps(b[i], b[i + 1]);
        }
        for (int i = 0; i < LANES; i += 4)
            for (int h = 0; h < 2; h++) {
                __m512d one = _mm512_castps_pd(a[i + h]), two = _mm512_castps_pd(a[i + h + 2]);
                b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, two));
                b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(one, two));
            }
        for (int c = 0; c < 4; c++) {
            __m512 p = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), q = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
            __m512 u = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd), v = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
            a[c] = _mm512_shuffle_f32x4(p, q, 0x88);
            a[4 + c] = _mm512_shuffle_f32x4(u, v, 0x88);
            a[8 + c] = _mm512_shuffle_f32x4(p, q, 0xdd);
            a[12 + c] = _mm512_shuffle_f32x4(u, v, 0xdd);
        }
        for (int j = 0; j < LANES; j++) {
            if (j >= count) break;
            float *to = (float *)(void *)(t + place(k, r + j));
            __m512 value = f ? _mm512_mul_ps(a[j], by) : a[j];
            if (past)
                _mm512_stream_ps(to, value);
            else
                _mm512_storeu_ps(to, value);
        }
    }
    return exponent && k->run && _mm512_cmpeq_epi32_mask(lacking, _mm512_setzero_si512());
}
#else
static inline int has_wide(void) { return 0; }
static int copy_lines(
    uint8_t *to, const uint8_t *from, size_t bytes, int64_t size, int64_t exponent, int past, const uint8_t *then) {
    return (void)to, (void)from, (void)bytes, (void)size, (void)exponent, (void)past, (void)then, 0;
}
static int turn_lines(
    single *t, const single *s, const single *f, int64_t f_step, const tile *k, int past, word exponent,
    const single *then) {
    return (void)t, (void)s, (void)f, (void)f_step, (void)k, (void)past, (void)exponent, (void)then, 0;
}
#endif
