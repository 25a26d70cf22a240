/* Vectors of LANES floats, as wide as the processor's, and half floats. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define LIST(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s), \
                   F(8, s), F(9, s), F(10, s), F(11, s), F(12, s), F(13, s), F(14, s), F(15, s)
#elif defined(__AVX2__)
#define LANES 8
#define LIST(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s)
#else
#define LANES 4
#define LIST(F, s) F(0, s), F(1, s), F(2, s), F(3, s)
#endif

#define INLINE static inline __attribute__((always_inline))
#define SUPER 256           /* values in a super-block */
#define UNIT 16             /* sub-blocks searched in one go, and super-blocks in a batch */
#define MAGIC 12582912.0f   /* 1.5 * 2^23: adding it rounds a float to an integer, ties to even */
#define LARGEST 0x1p60f     /* sums of squares and weights above this are not ordinary */
#define NARROWEST 0x1p-100f /* ranges below this are not ordinary */

/* ggml_type of the types made here, and bytes in their blocks. */
enum {
    F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    IQ4_NL = 20, IQ4_XS = 23, BF16 = 30
};
enum {
    Q4_0_BYTES = 18, Q4_1_BYTES = 20, Q5_0_BYTES = 22, Q5_1_BYTES = 24, Q8_0_BYTES = 34, IQ4_NL_BYTES = 18,
    Q2_K_BYTES = 84, Q3_K_BYTES = 110, Q4_K_BYTES = 144, Q5_K_BYTES = 176, Q6_K_BYTES = 210, IQ4_XS_BYTES = 136
};

/* Constants of llama.cpp. The tests change one on the compiler's command line: a wrong kernel has to be found out. */
#ifndef NO_SCALE
#define NO_SCALE 1e-15f /* GROUP_MAX_EPS: below it a sub-block counts as zero */
#endif
#ifndef COARSE_STEP
#define COARSE_STEP 0.1f /* between the scales that a search tries */
#endif
#ifndef FINE_STEP
#define FINE_STEP 0.05f /* the same, with an importance matrix */
#endif
#ifndef TURNS
#define TURNS 5 /* how often quants are changed one by one */
#endif
#ifndef LAST_MIDDLE
#define LAST_MIDDLE 101.0f /* between the last two levels of IQ4 */
#endif
#ifndef BELOW_HALF
#define BELOW_HALF 0x1.fffffep-2f /* the float before 0.5 */
#endif
#ifndef TIES_TO_EVEN
#define TIES_TO_EVEN 1 /* in 16-bit floats */
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

typedef size_t (*chunk_function)(int, const float *, void *, int64_t, int64_t, int64_t, const float *);

INLINE vf splat(float value) { return value - (vf){0}; }
INLINE vf load(const float *from) { vf v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(float *to, vf v) { memcpy(to, &v, sizeof v); }
INLINE void store_ints(int32_t *to, vi v) { memcpy(to, &v, sizeof v); }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf absolute(vf v) { return (vf)((vi)v & 0x7fffffff); }

/* min(a, b) is a < b ? a : b and max(a, b) is a > b ? a : b, to the sign of zero. `bits` has a bit a true lane. */
#if LANES == 16
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vi imin(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
INLINE vi imax(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE vf root(vf v) { return (vf)_mm512_sqrt_ps((__m512)v); }
INLINE uint32_t bits(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask); }
#elif LANES == 8
INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vi imin(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
INLINE vi imax(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE vf root(vf v) { return (vf)_mm256_sqrt_ps((__m256)v); }
INLINE uint32_t bits(vi mask) { return (uint32_t)_mm256_movemask_ps((__m256)mask); }
#else
INLINE vf vmin(vf a, vf b) { return choose(a < b, a, b); }
INLINE vf vmax(vf a, vf b) { return choose(a > b, a, b); }
INLINE vi imin(vi a, vi b) { vi m = a < b; return (m & a) | (~m & b); }
INLINE vi imax(vi a, vi b) { vi m = a > b; return (m & a) | (~m & b); }
INLINE vf root(vf v) { for (int k = 0; k < LANES; k++) v[k] = sqrtf(v[k]); return v; }
INLINE uint32_t bits(vi mask) {
    uint32_t all = 0;
    for (int k = 0; k < LANES; k++) all |= (uint32_t)(mask[k] != 0) << k;
    return all;
}
#endif

INLINE uint32_t false_lanes(vi mask) { return ~bits(mask) & ((1u << LANES) - 1); }

/* llama.cpp's nearest_int: what it makes of values beyond 2^22 is odd, and kept. */
INLINE vi nearest(vf v) { return ((vi)(v + MAGIC) & 0x007fffff) - 0x00400000; }
INLINE int nearest_int(float value) {
    float moved = value + MAGIC;
    int32_t i;
    memcpy(&i, &moved, sizeof i);
    return (i & 0x007fffff) - 0x00400000;
}
/* The same within 2^22, left as a float. */
INLINE vf rounded(vf v) { return (v + MAGIC) - MAGIC; }

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define LOWER(k, s) (((k) & (s)) ? LANES + ((k) ^ (s)) : (k))
#define UPPER(k, s) (((k) & (s)) ? LANES + (k) : ((k) | (s)))
#define SWAPPED(k, s) ((k) ^ (s))
#define EXCHANGE(m, s)                                    \
    for (int r = 0; r < LANES; r++)                       \
        if (!(r & (s))) {                                 \
            vf a = (m)[r], b = (m)[r | (s)];              \
            (m)[r] = SHUFFLE(a, b, LIST(LOWER, s));       \
            (m)[r | (s)] = SHUFFLE(a, b, LIST(UPPER, s)); \
        }

/* Lane k of out[i] is rows[k][i], for i in [0, n); n is a multiple of LANES. */
INLINE void load_columns(const float *const *rows, int n, vf *out) {
    for (int at = 0; at < n; at += LANES) {
        vf *m = out + at;
        for (int k = 0; k < LANES; k++) m[k] = load(rows[k] + at);
        EXCHANGE(m, 1)
        EXCHANGE(m, 2)
#if LANES > 4
        EXCHANGE(m, 4)
#endif
#if LANES > 8
        EXCHANGE(m, 8)
#endif
    }
}

/* The largest of the lanes, none negative. */
INLINE int32_t largest(vi v) {
#if LANES > 8
    v = imax(v, SHUFFLE(v, v, LIST(SWAPPED, 8)));
#endif
#if LANES > 4
    v = imax(v, SHUFFLE(v, v, LIST(SWAPPED, 4)));
#endif
    v = imax(v, SHUFFLE(v, v, LIST(SWAPPED, 2)));
    v = imax(v, SHUFFLE(v, v, LIST(SWAPPED, 1)));
    return v[0];
}

/* Half floats, to nearest, ties to even. */
INLINE float float_from_bits(uint32_t u) { float f; memcpy(&f, &u, sizeof f); return f; }
INLINE uint32_t bits_of_float(float f) { uint32_t u; memcpy(&u, &f, sizeof u); return u; }

INLINE uint16_t half_from_float(float f) {
    uint32_t u = bits_of_float(f), sign = (u >> 16) & 0x8000, size = u & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    /* Below 2^-14 halves are 2^-24 apart, as floats from 0.5 on are: the addition rounds. */
    if (size < 0x38800000) return (uint16_t)(sign | (bits_of_float(float_from_bits(size) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((size + 0xfff + ((size >> 13) & 1) - (112u << 23)) >> 13));
}

INLINE float float_from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    float size = (float)fraction * 0x1p-24f;
    return float_from_bits(sign | bits_of_float(size));
}

INLINE void put_half(uint8_t *to, uint16_t h) { memcpy(to, &h, sizeof h); }
