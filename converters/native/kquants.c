/* Quantization of float32 rows to GGUF blocks with the bytes of llama.cpp's `ggml_quantize_chunk`, several times faster.
 *
 * llama.cpp (ggml/src/ggml-quants.c) searches the scale of one sub-block after another in scalar code. Here each vector
 * lane holds another sub-block, and does the float operations of the scalar code in the same order: the same bits,
 * LANES sub-blocks at a time. A branch of the scalar code is a mask here. Build without -ffast-math and with
 * -ffp-contract=off.
 *
 * Blocks that are out of the ordinary (not finite, huge, or so tiny that a reciprocal overflows) are handed to
 * ggml_quantize_chunk itself, so only the ordinary ones have to be equal by reasoning.
 *
 * License: Apache-2.0, as the rest of edgelora.
 */
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

/* ---- vectors ---------------------------------------------------------------------------------------------------- */

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

/* ---- half floats, to nearest, ties to even ---------------------------------------------------------------------- */

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

/* ---- searches: each lane is a group of n values ----------------------------------------------------------------- */

/* What was found for UNIT groups. An `odd` group (a bit each) is not ordinary, and its other fields mean nothing. */
typedef struct {
    float scale[UNIT], min[UNIT], step[UNIT], base[UNIT], weight[UNIT];
    uint32_t odd;
} found_t;

/* Weights of the values. With a sigma: importance * sqrt(sigma2 + x*x), where sigma2 is given or that of the group. */
enum weighting { ABSOLUTE, ABSOLUTE_AND_RMS, SQUARED, IMPORTANCE, IMPORTANCE_AND_SIGMA, IMPORTANCE_AND_OWN_SIGMA };

INLINE vf sum_of_squares(int n, const vf *x) {
    vf sum = splat(0);
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

INLINE void weigh(enum weighting kind, int n, const vf *x, const float *const *importance, const float *sigma2, vf *w) {
    if (kind >= IMPORTANCE) load_columns(importance, n, w);
    if (kind > IMPORTANCE) {
        vf spread = kind == IMPORTANCE_AND_SIGMA ? load(sigma2) : sum_of_squares(n, x) * (2.0f / (float)n);
        for (int i = 0; i < n; i++) w[i] = w[i] * root(spread + x[i] * x[i]);
    }
    if (kind == ABSOLUTE)
        for (int i = 0; i < n; i++) w[i] = absolute(x[i]);
    if (kind == SQUARED)
        for (int i = 0; i < n; i++) w[i] = x[i] * x[i];
    if (kind == ABSOLUTE_AND_RMS) {
        vf rms = root(sum_of_squares(n, x) / (float)n);
        for (int i = 0; i < n; i++) w[i] = rms + absolute(x[i]);
    }
}

/* Quants of one step size, and the three sums of make_qkx2_quants. */
INLINE void fit(int n, int clamp, float nmax, vf step, vf min, const vf *x, const vf *w, vf *quants, vf *sum_l,
                vf *sum_l2, vf *sum_xl) {
    vf a = splat(0), b = splat(0), c = splat(0);
    for (int i = 0; i < n; i++) {
        vf l = vmax(rounded(step * (x[i] - min)), splat(0));
        if (clamp) l = vmin(l, splat(nmax));
        quants[i] = l;
        vf wl = w[i] * l;
        a += wl;
        b += wl * l;
        c += wl * x[i];
    }
    *sum_l = a, *sum_l2 = b, *sum_xl = c;
}

INLINE vf error_of(int n, int absolute_error, vf scale, vf min, const vf *x, const vf *w, const vf *quants) {
    vf error = splat(0);
    for (int i = 0; i < n; i++) {
        vf diff = scale * quants[i] + min - x[i];
        error += w[i] * (absolute_error ? absolute(diff) : diff * diff);
    }
    return error;
}

/* make_qkx2_quants and make_qkx3_quants: x = scale * quant + min. Each step starts from the min of the best so far. */
INLINE void search_affine(int n, float nmax, float first, float delta, int n_steps, int absolute_error,
                          enum weighting kind, const float *const *rows, const float *const *importance,
                          const float *sigma2, int at, found_t *found) {
    vf x[32], w[32], quants[32];
    load_columns(rows + at, n, x);
    weigh(kind, n, x, importance ? importance + at : 0, sigma2 ? sigma2 + at : 0, w);
    vf min = x[0], max = x[0], sum_w = w[0], sum_x = w[0] * x[0], squares = x[0] * x[0];
    for (int i = 1; i < n; i++) {
        min = vmin(x[i], min);
        max = vmax(x[i], max);
        sum_w += w[i];
        sum_x += w[i] * x[i];
        squares += x[i] * x[i];
    }
    min = vmin(splat(0), min);
    vi flat = max == min;
    vf lowest = min;
    max = choose(flat, min + 1, max); /* no division by zero; what is found is not used */
    vf range = max - min;
    /* A range that shrinks below this makes quants that `rounded` cannot hold. */
    vf narrowest = range * 0x1p-16f;
    vi ordinary = (squares < LARGEST) & (absolute(sum_w) < LARGEST), wide = range >= NARROWEST;
    vf step = nmax / range, scale = 1 / step, best_step = step, best_base = min;
    for (int i = 0; i < n; i++) quants[i] = vmax(vmin(rounded(step * (x[i] - min)), splat(nmax)), splat(0));
    vf best = error_of(n, absolute_error, scale, min, x, w, quants);
    for (int is = 0; is <= n_steps; is++) {
        vf sum_l, sum_l2, sum_xl;
        float levels = first + delta * is + nmax;
        range = max - min;
        wide &= range >= narrowest;
        step = levels / range;
        /* Up to 0.4 above nmax still rounds to nmax. */
        if (levels > nmax + 0.4f)
            fit(n, 1, nmax, step, min, x, w, quants, &sum_l, &sum_l2, &sum_xl);
        else
            fit(n, 0, nmax, step, min, x, w, quants, &sum_l, &sum_l2, &sum_xl);
        vf determinant = sum_w * sum_l2 - sum_l * sum_l;
        vi better = determinant > 0;
        vf this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        vf this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        vi above_zero = this_min > 0;
        if (bits(above_zero)) {
            this_min = choose(above_zero, splat(0), this_min);
            this_scale = choose(above_zero, sum_xl / sum_l2, this_scale);
        }
        vf error = error_of(n, absolute_error, this_scale, this_min, x, w, quants);
        better &= error < best;
        best = choose(better, error, best);
        best_step = choose(better, step, best_step);
        best_base = choose(better, min, best_base);
        scale = choose(better, this_scale, scale);
        min = choose(better, this_min, min);
    }
    store(found->scale + at, choose(flat, splat(0), scale));
    store(found->min + at, -choose(flat, lowest, min));
    store(found->step + at, choose(flat, splat(0), best_step));
    store(found->base + at, best_base);
    store(found->weight + at, sum_w);
    found->odd |= false_lanes(ordinary & (wide | flat)) << at;
}

/* make_qx_quants with weights: x = scale * quant, quants from -nmax to nmax - 1. */
INLINE void search_symmetric(int n, float nmax, enum weighting kind, const float *const *rows,
                             const float *const *importance, const float *sigma2, int at, found_t *found) {
    vf x[32], w[32], wx[32];
    load_columns(rows + at, n, x);
    weigh(kind, n, x, importance ? importance + at : 0, sigma2 ? sigma2 + at : 0, w);
    vf size = splat(0), max = splat(0), sum_w = splat(0), squares = splat(0);
    for (int i = 0; i < n; i++) {
        vf a = absolute(x[i]);
        max = choose(a > size, x[i], max);
        size = vmax(a, size);
        sum_w += w[i];
        squares += x[i] * x[i];
        wx[i] = w[i] * x[i];
    }
    vi zero = size < NO_SCALE;
    vi ordinary = (squares < LARGEST) & (absolute(sum_w) < LARGEST);
    vf divisor = choose(zero, splat(1), max);
    vf scale = splat(0), best = splat(0), best_step = splat(0);
    for (int k = -1; k < 19; k++) {
        int is = k < 0 ? 0 : k - 9; /* the plain step first, then -9 to 9 without 0 */
        if (k >= 0 && is == 0) continue;
        vf step = -(nmax + COARSE_STEP * is) / divisor;
        if (k < 0) step = -nmax / divisor;
        vf sum_lx = splat(0), sum_l2 = splat(0);
        for (int i = 0; i < n; i++) {
            vf l = vmax(vmin(rounded(step * x[i]), splat(nmax - 1)), splat(-nmax));
            sum_lx += wx[i] * l;
            sum_l2 += w[i] * l * l;
        }
        vi better = k < 0 ? (vi)(sum_l2 == sum_l2) : (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2);
        if (!bits(better)) continue;
        vf this_scale = choose(sum_l2 != 0, sum_lx / sum_l2, splat(0));
        scale = choose(better, this_scale, scale);
        best = choose(better, this_scale * sum_lx, best);
        best_step = choose(better, step, best_step);
    }
    store(found->scale + at, choose(zero, splat(0), scale));
    store(found->step + at, choose(zero, splat(0), best_step));
    store(found->weight + at, sum_w);
    found->odd |= false_lanes(ordinary) << at;
}

/* make_q3_quants: x = scale * quant, each quant changed as long as that helps. `quants` has UNIT floats a value. */
INLINE void search_stepwise(int n, float nmax, const float *const *rows, int at, found_t *found, float *quants) {
    vf x[16], w[16], wx[16], l[16];
    load_columns(rows + at, n, x);
    vf size = splat(0), max = splat(0), sum_lx = splat(0), sum_l2 = splat(0);
    for (int i = 0; i < n; i++) {
        vf a = absolute(x[i]);
        max = choose(a > size, x[i], max);
        size = vmax(a, size);
        w[i] = x[i] * x[i];
        wx[i] = w[i] * x[i];
    }
    vi zero = size < NO_SCALE, ordinary = sum_of_squares(n, x) < LARGEST;
    vf step = -nmax / choose(zero, splat(1), max);
    for (int i = 0; i < n; i++) {
        l[i] = vmax(vmin(rounded(step * x[i]), splat(nmax - 1)), splat(-nmax));
        sum_lx += wx[i] * l[i];
        sum_l2 += w[i] * l[i] * l[i];
    }
    for (int turn = 0; turn < TURNS; turn++) {
        vi changed = {0};
        for (int i = 0; i < n; i++) {
            vf slx = sum_lx - wx[i] * l[i], sl2 = sum_l2 - w[i] * l[i] * l[i];
            vi usable = slx > 0;
            vi wanted = nearest(x[i] * sl2 / slx);
            wanted = imax(imin(wanted, (vi){0} + (int)(nmax - 1)), (vi){0} + (int)-nmax);
            vf this_l = __builtin_convertvector(wanted, vf);
            usable &= this_l != l[i];
            slx += wx[i] * this_l;
            sl2 += w[i] * this_l * this_l;
            usable &= (sl2 > 0) & (slx * slx * sum_l2 > sum_lx * sum_lx * sl2);
            l[i] = choose(usable, this_l, l[i]);
            sum_lx = choose(usable, slx, sum_lx);
            sum_l2 = choose(usable, sl2, sum_l2);
            changed |= usable;
        }
        if (!bits(changed)) break;
    }
    for (int i = 0; i < n; i++) store(quants + i * UNIT + at, choose(zero, splat(0), l[i] + nmax));
    store(found->scale + at, choose(zero | ~(sum_l2 > 0), splat(0), sum_lx / sum_l2));
    found->odd |= false_lanes(ordinary) << at;
}

/* The values of IQ4 (kvalues_iq4nl, ggml/src/ggml-common.h), and what lies half way between each and the next. */
static const float LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const float MIDDLES[16] = {-115.5f, -93.5f, -74, -57, -42, -28.5f, -16, -4.5f,
                                  7, 19, 31.5f, 45.5f, 61, 79, LAST_MIDDLE, 127};

/* The number of the nearest level, the upper one in the middle (best_index_int8). */
#if LANES == 16
INLINE vi level_number(vf v) {
    __m512 x = (__m512)v, middles = _mm512_loadu_ps(MIDDLES);
    __m512i at = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int half = 8; half; half /= 2) {
        __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32(half - 1)), middles);
        __mmask16 upper = _mm512_cmp_ps_mask(x, middle, _CMP_GE_OQ);
        at = _mm512_mask_add_epi32(at, upper, at, _mm512_set1_epi32(half));
    }
    return (vi)at;
}
INLINE vf level(vf v) { return (vf)_mm512_permutexvar_ps((__m512i)level_number(v), _mm512_loadu_ps(LEVELS)); }
#else
INLINE vi level_number(vf v) {
    vi at = {0};
    for (int k = 0; k < 15; k++) at -= v >= splat(MIDDLES[k]);
    return at;
}
INLINE vf level(vf v) {
    vf found = splat(LEVELS[0]);
    for (int k = 0; k < 15; k++) found += (vf)((v >= splat(MIDDLES[k])) & (vi)splat(LEVELS[k + 1] - LEVELS[k]));
    return found;
}
#endif

/* The search of quantize_row_iq4_nl_impl: x = scale * one of LEVELS. */
INLINE void search_levels(int n, enum weighting kind, const float *const *rows, const float *const *importance,
                          const float *sigma2, int at, found_t *found) {
    vf x[32], w[32];
    load_columns(rows + at, n, x);
    weigh(kind, n, x, importance ? importance + at : 0, sigma2 ? sigma2 + at : 0, w);
    vf size = splat(0), max = splat(0), sum_w = splat(0);
    for (int i = 0; i < n; i++) {
        vf a = absolute(x[i]);
        max = choose(a > size, x[i], max);
        size = vmax(a, size);
        sum_w += w[i];
    }
    vi zero = size < NO_SCALE;
    vi ordinary = (sum_of_squares(n, x) < LARGEST) & (absolute(sum_w) < LARGEST);
    max = choose(zero, splat(1), max);
    vf scale = splat(0), best = splat(0);
    for (int k = -8; k <= 7; k++) {
        vf inverse = k < -7 ? 1 / (-max / LEVELS[0]) : (k + LEVELS[0]) / max;
        vf sum_qx = splat(0), sum_q2 = splat(0);
        for (int i = 0; i < n; i++) {
            vf q = level(inverse * x[i]);
            vf wq = w[i] * q;
            sum_qx += wq * x[i];
            sum_q2 += wq * q;
        }
        vi better = sum_q2 > 0;
        if (k >= -7) better &= sum_qx * sum_qx > best * sum_q2;
        if (!bits(better)) continue;
        vf this_scale = sum_qx / sum_q2;
        scale = choose(better, this_scale, scale);
        best = choose(better, this_scale * sum_qx, best);
    }
    scale = choose(zero, splat(0), scale);
    ordinary &= (scale == 0) | (absolute(scale) >= NARROWEST);
    store(found->scale + at, scale);
    found->odd |= false_lanes(ordinary) << at;
}

/* ---- final quants, along the values of one sub-block ------------------------------------------------------------ */

/* Quants of the searched step, for a sub-block whose stored scale is zero: llama.cpp leaves what the search chose. */
static void searched_affine(const float *x, int n, int nmax, float step, float base, int32_t *quants) {
    for (int i = 0; i < n; i++) {
        int l = nearest_int(step * (x[i] - base));
        quants[i] = l < 0 ? 0 : l > nmax ? nmax : l;
    }
}

static void searched_symmetric(const float *x, int n, int nmax, float step, int32_t *quants) {
    for (int i = 0; i < n; i++) {
        int l = nearest_int(step * x[i]);
        quants[i] = step == 0 ? 0 : nmax + (l < -nmax ? -nmax : l > nmax - 1 ? nmax - 1 : l);
    }
}

/* (x + offset) / scale to the nearest integer in [low, high], plus shift. */
INLINE void divide(const float *x, int n, float scale, float offset, int low, int high, int shift, int32_t *quants) {
    for (int i = 0; i < n; i += LANES) {
        vi l = nearest((load(x + i) + offset) / scale);
        store_ints(quants + i, imax(imin(l, (vi){0} + high), (vi){0} + low) + shift);
    }
}

INLINE void number_levels(const float *x, int n, float inverse, int32_t *quants) {
    for (int i = 0; i < n; i += LANES) store_ints(quants + i, level_number(inverse * load(x + i)));
}

/* ---- batches of super-blocks ------------------------------------------------------------------------------------ */

/* Where a batch of at most UNIT super-blocks lies. Past `count`, the last one is repeated. */
typedef struct {
    int count;
    const float *x[UNIT], *importance[UNIT];
} batch_t;

static batch_t batch_at(const float *x, const float *importance, int64_t first, int64_t total, int64_t per_row) {
    batch_t batch;
    batch.count = (int)(total - first < UNIT ? total - first : UNIT);
    for (int s = 0; s < UNIT; s++) {
        int64_t block = first + (s < batch.count ? s : batch.count - 1);
        batch.x[s] = x + block * SUPER;
        batch.importance[s] = importance ? importance + block % per_row * SUPER : 0;
    }
    return batch;
}

/* The UNIT sub-blocks of n values that begin at super-block `first` of a batch. */
INLINE void sub_blocks(const float *const *blocks, int first, int n, const float **rows) {
    int per_block = SUPER / n;
    for (int j = 0; j < UNIT; j++) rows[j] = blocks[first + j / per_block] + j % per_block * n;
}

/* The sums of squares of whole super-blocks, each in order. */
static void sums_of_squares(const batch_t *batch, float *sums) {
    for (int at = 0; at < UNIT && at < batch->count; at += LANES) {
        vf sum = splat(0), x[32];
        for (int i = 0; i < SUPER; i += 32) {
            const float *rows[LANES];
            for (int k = 0; k < LANES; k++) rows[k] = batch->x[at + k] + i;
            load_columns(rows, 32, x);
            for (int l = 0; l < 32; l++) sum += x[l] * x[l];
        }
        store(sums + at, sum);
    }
}

typedef struct {
    float nmax, first, delta;
    int steps, absolute_error;
    enum weighting kind;
} affine_t;

/* Searches every sub-block of a batch; `found` has one entry for each UNIT sub-blocks. */
INLINE void search_batch_affine(const batch_t *batch, int n, affine_t how, float sigma_factor, found_t *found) {
    int per_unit = UNIT * n / SUPER;
    float sums[UNIT], sigma2[UNIT];
    if (how.kind == IMPORTANCE_AND_SIGMA) sums_of_squares(batch, sums);
    for (int first = 0; first < batch->count; first += per_unit, found++) {
        const float *rows[UNIT], *importance[UNIT];
        sub_blocks(batch->x, first, n, rows);
        if (how.kind == IMPORTANCE_AND_SIGMA) {
            sub_blocks(batch->importance, first, n, importance);
            for (int j = 0; j < UNIT; j++) sigma2[j] = sigma_factor * sums[first + j * n / SUPER] / SUPER;
        }
        found->odd = 0;
        for (int at = 0; at < UNIT; at += LANES)
            search_affine(n, how.nmax, how.first, how.delta, how.steps, how.absolute_error, how.kind, rows, importance,
                          sigma2, at, found);
    }
}

/* make_qp_quants: scales of n sub-blocks (columns of `values`, one super-block a lane) as integers from 0 to nmax. A
 * super-block that is not ordinary gets its bit set in `odd`. */
INLINE void share_scale(int n, float nmax, const vf *x, const vf *w, vf *quants, vf *scale, uint32_t *odd, int at) {
    vf max = splat(0), least = splat(0);
    for (int i = 0; i < n; i++) {
        max = vmax(max, x[i]);
        least = vmin(least, x[i]);
    }
    vi zero = max < NO_SCALE;
    vi strange = ~((least >= 0) & (max < LARGEST));
    max = choose(zero, splat(1), max);
    vf step = nmax / max, size = 1 / step, best = splat(0);
    for (int i = 0; i < n; i++) {
        vf diff = x[i] - size * rounded(step * x[i]);
        best += w[i] * diff * diff;
    }
    for (int is = -4; is <= 4; is++) {
        if (is == 0) continue;
        vf this_step = (COARSE_STEP * is + nmax) / max, this_size = 1 / this_step, error = splat(0);
        for (int i = 0; i < n; i++) {
            vf diff = x[i] - this_size * vmin(rounded(this_step * x[i]), splat(nmax));
            error += w[i] * diff * diff;
        }
        vi better = error < best;
        best = choose(better, error, best);
        step = choose(better, this_step, step);
    }
    vf sum_lx = splat(0), sum_l2 = splat(0);
    for (int i = 0; i < n; i++) {
        vf l = vmin(rounded(step * x[i]), splat(nmax));
        quants[i] = l;
        sum_lx += w[i] * x[i] * l;
        sum_l2 += w[i] * l * l;
    }
    for (int turn = 0; turn < TURNS; turn++) {
        vi changed = {0};
        for (int i = 0; i < n; i++) {
            vf slx = sum_lx - w[i] * x[i] * quants[i], sl2 = sum_l2 - w[i] * quants[i] * quants[i];
            vi usable = (slx > 0) & (sl2 > 0);
            vf wanted = x[i] * sl2 / slx;
            strange |= usable & ~(wanted < 0x1p21f);
            vf l = vmin(rounded(wanted), splat(nmax));
            usable &= l != quants[i];
            slx += w[i] * x[i] * l;
            sl2 += w[i] * l * l;
            usable &= slx * slx * sum_l2 > sum_lx * sum_lx * sl2;
            quants[i] = choose(usable, l, quants[i]);
            sum_lx = choose(usable, slx, sum_lx);
            sum_l2 = choose(usable, sl2, sum_l2);
            changed |= usable;
        }
        if (!bits(changed)) break;
    }
    *scale = choose(zero | ~(sum_l2 > 0), splat(0), sum_lx / sum_l2);
    for (int i = 0; i < n; i++) quants[i] = choose(zero, splat(0), quants[i]);
    *odd |= false_lanes(~strange) << at;
}

/* Stored scales and mins of the super-blocks of a batch, with how many they are of in the block's own numbers. */
typedef struct {
    float scale[UNIT], min[UNIT];
    uint8_t scales[UNIT][16], mins[UNIT][16];
} shared_t;

/* One value of each sub-block of a batch, a super-block a row; past `count`, the last one is repeated. */
enum field { SCALE, MIN, WEIGHT };
INLINE void gather(const batch_t *batch, int n_sub, const found_t *found, enum field field, float (*values)[16],
                   const float **rows) {
    memset(values, 0, UNIT * 16 * sizeof(float));
    for (int s = 0; s < UNIT; s++) {
        int first = (s < batch->count ? s : batch->count - 1) * n_sub;
        const found_t *unit = &found[first / UNIT];
        const float *from = field == SCALE ? unit->scale : field == MIN ? unit->min : unit->weight;
        memcpy(values[s], from + first % UNIT, (size_t)n_sub * sizeof(float));
        rows[s] = values[s];
    }
}

/* Both shared scales of a batch from an importance matrix; returns the bits of super-blocks that are not ordinary. */
INLINE uint32_t share_batch(const batch_t *batch, int n_sub, float nmax, const found_t *found, shared_t *shared) {
    uint32_t odd = 0;
    float values[2][UNIT][16];
    const float *rows[2][UNIT];
    gather(batch, n_sub, found, WEIGHT, values[1], rows[1]);
    for (enum field field = SCALE; field <= MIN; field++) {
        gather(batch, n_sub, found, field, values[0], rows[0]);
        for (int at = 0; at < batch->count; at += LANES) {
            vf x[16], w[16], quants[16], scale;
            load_columns(rows[0] + at, 16, x);
            load_columns(rows[1] + at, 16, w);
            share_scale(n_sub, nmax, x, w, quants, &scale, &odd, at);
            store((field == MIN ? shared->min : shared->scale) + at, scale);
            for (int j = 0; j < n_sub; j++)
                for (int k = 0; k < LANES; k++)
                    (field == MIN ? shared->mins : shared->scales)[at + k][j] = (uint8_t)quants[j][k];
        }
    }
    return odd;
}

/* ---- Q4_K and Q5_K ---------------------------------------------------------------------------------------------- */

/* Eight 6-bit scales and eight 6-bit mins in 12 bytes. */
static void pack_scales_and_mins(const uint8_t *scales, const uint8_t *mins, uint8_t *to) {
    for (int j = 0; j < 4; j++) {
        to[j] = (uint8_t)(scales[j] | (scales[j + 4] >> 4) << 6);
        to[j + 4] = (uint8_t)(mins[j] | (mins[j + 4] >> 4) << 6);
        to[j + 8] = (uint8_t)((scales[j + 4] & 15) | (mins[j + 4] & 15) << 4);
    }
}

/* The largest scale shares its 63rds with the others. */
static float share_plainly(const float *values, int n, float levels, int limit, uint8_t *quants) {
    float max = 0;
    for (int j = 0; j < n; j++)
        if (values[j] > max) max = values[j];
    float inverse = max > 0 ? levels / max : 0;
    for (int j = 0; j < n; j++) {
        uint8_t l = (uint8_t)nearest_int(inverse * values[j]);
        quants[j] = l > limit ? (uint8_t)limit : l;
    }
    return max / levels;
}

/* d, dmin, 12 bytes of scales, then (Q5_K) 32 bytes of fifth bits, then 128 bytes of four bits. */
INLINE void write_q45(const float *x, int nmax, const found_t *found, int at, float scale, float min,
                      const uint8_t *scales, const uint8_t *mins, uint8_t *to) {
    int32_t quants[SUPER];
    uint16_t d = half_from_float(scale), dmin = half_from_float(min);
    put_half(to, d);
    put_half(to + 2, dmin);
    pack_scales_and_mins(scales, mins, to + 4);
    for (int j = 0; j < 8; j++) {
        float step = float_from_half(d) * scales[j];
        const float *sub = x + 32 * j;
        if (step == 0)
            searched_affine(sub, 32, nmax, found->step[at + j], found->base[at + j], quants + 32 * j);
        else
            divide(sub, 32, step, float_from_half(dmin) * mins[j], 0, nmax, 0, quants + 32 * j);
    }
    uint8_t *low = to + (nmax == 31 ? 48 : 16);
    for (int j = 0; j < SUPER; j += 64, low += 32)
        for (int l = 0; l < 32; l++) low[l] = (uint8_t)((quants[j + l] & 15) | (quants[j + l + 32] & 15) << 4);
    if (nmax == 31)
        for (int l = 0; l < 32; l++) {
            int high = 0;
            for (int j = 0; j < 8; j++) high |= (quants[32 * j + l] >> 4) << j;
            to[16 + l] = (uint8_t)high;
        }
}

INLINE int64_t quantize_q45(int type, int nmax, int bytes, affine_t plain, const float *x, uint8_t *out,
                            const float *importance, int64_t total, int64_t per_row, chunk_function ggml) {
    affine_t weighted = {(float)nmax, -0.9f, FINE_STEP, 36, 0, IMPORTANCE_AND_SIGMA};
    int64_t handed_over = 0;
    for (int64_t first = 0; first < total; first += UNIT) {
        batch_t batch = batch_at(x, importance, first, total, per_row);
        found_t found[8];
        shared_t shared;
        uint32_t odd = 0;
        if (importance) {
            search_batch_affine(&batch, 32, weighted, 2, found);
            odd = share_batch(&batch, 8, 63, found, &shared);
        } else {
            search_batch_affine(&batch, 32, plain, 0, found);
        }
        for (int s = 0; s < batch.count; s++) {
            const found_t *unit = &found[s / 2];
            int at = s % 2 * 8;
            uint8_t *to = out + (first + s) * bytes;
            if ((unit->odd >> at & 255) || (odd >> s & 1)) {
                ggml(type, batch.x[s], to, 0, 1, SUPER, batch.importance[s]);
                handed_over++;
                continue;
            }
            if (!importance) {
                shared.scale[s] = share_plainly(unit->scale + at, 8, 63, 63, shared.scales[s]);
                shared.min[s] = share_plainly(unit->min + at, 8, 63, 63, shared.mins[s]);
            }
            write_q45(batch.x[s], nmax, unit, at, shared.scale[s], shared.min[s], shared.scales[s], shared.mins[s], to);
        }
    }
    return handed_over;
}

static int64_t quantize_q4_k(const float *x, uint8_t *out, const float *importance, int64_t total, int64_t per_row,
                             chunk_function ggml) {
    affine_t plain = {15, -1, COARSE_STEP, 20, 0, ABSOLUTE_AND_RMS};
    return quantize_q45(12, 15, 144, plain, x, out, importance, total, per_row, ggml);
}

static int64_t quantize_q5_k(const float *x, uint8_t *out, const float *importance, int64_t total, int64_t per_row,
                             chunk_function ggml) {
    affine_t plain = {31, -0.5f, COARSE_STEP, 15, 0, ABSOLUTE_AND_RMS};
    return quantize_q45(13, 31, 176, plain, x, out, importance, total, per_row, ggml);
}

/* ---- Q6_K ------------------------------------------------------------------------------------------------------- */

/* 128 bytes of four bits, 64 of two bits, 16 scales, d. */
static void write_q6(const float *x, const found_t *found, uint8_t *to) {
    int32_t quants[SUPER];
    float size = 0, max = 0;
    for (int j = 0; j < 16; j++) {
        float a = fabsf(found->scale[j]);
        if (a > size) size = a, max = found->scale[j];
    }
    if (size < NO_SCALE) {
        memset(to, 0, 210);
        return;
    }
    float inverse = -128.0f / max;
    uint16_t d = half_from_float(1 / inverse);
    put_half(to + 208, d);
    for (int j = 0; j < 16; j++) {
        int l = nearest_int(inverse * found->scale[j]);
        int8_t scale = (int8_t)(l > 127 ? 127 : l);
        to[192 + j] = (uint8_t)scale;
        float step = float_from_half(d) * scale;
        if (step == 0)
            searched_symmetric(x + 16 * j, 16, 32, found->step[j], quants + 16 * j);
        else
            divide(x + 16 * j, 16, step, 0, -32, 31, 32, quants + 16 * j);
    }
    uint8_t *low = to, *high = to + 128;
    for (int32_t *q = quants; q < quants + SUPER; q += 128, low += 64, high += 32)
        for (int l = 0; l < 32; l++) {
            low[l] = (uint8_t)((q[l] & 15) | (q[l + 64] & 15) << 4);
            low[l + 32] = (uint8_t)((q[l + 32] & 15) | (q[l + 96] & 15) << 4);
            high[l] = (uint8_t)(q[l] >> 4 | (q[l + 32] >> 4) << 2 | (q[l + 64] >> 4) << 4 | (q[l + 96] >> 4) << 6);
        }
}

static int64_t quantize_q6_k(const float *x, uint8_t *out, const float *importance, int64_t total, int64_t per_row,
                             chunk_function ggml) {
    int64_t handed_over = 0;
    for (int64_t block = 0; block < total; block++, x += SUPER, out += 210) {
        const float *rows[UNIT], *weights[UNIT], *block_importance = importance ? importance + block % per_row * SUPER : 0;
        found_t found;
        found.odd = 0;
        sub_blocks(&x, 0, 16, rows);
        if (importance) sub_blocks(&block_importance, 0, 16, weights);
        for (int at = 0; at < UNIT; at += LANES) {
            if (importance)
                search_symmetric(16, 32, IMPORTANCE, rows, weights, 0, at, &found);
            else
                search_symmetric(16, 32, SQUARED, rows, 0, 0, at, &found);
        }
        if (found.odd) {
            ggml(14, x, out, 0, 1, SUPER, block_importance);
            handed_over++;
        } else {
            write_q6(x, &found, out);
        }
    }
    return handed_over;
}

/* ---- Q2_K ------------------------------------------------------------------------------------------------------- */

/* Two bits of values that are 32 apart go into one byte. */
INLINE void pack_two_bits(const int32_t *quants, uint8_t *to) {
    for (int j = 0; j < SUPER; j += 128, to += 32)
        for (int l = 0; l < 32; l++) {
            const int32_t *q = quants + j + l;
            to[l] = (uint8_t)((q[0] & 3) | (q[32] & 3) << 2 | (q[64] & 3) << 4 | (q[96] & 3) << 6);
        }
}

/* 16 bytes of a scale and a min each, 64 bytes of two bits, d, dmin. */
static void write_q2(const float *x, const found_t *found, float scale, float min, const uint8_t *scales,
                     const uint8_t *mins, uint8_t *to) {
    int32_t quants[SUPER];
    uint16_t d = half_from_float(scale), dmin = half_from_float(min);
    for (int j = 0; j < 16; j++) {
        to[j] = (uint8_t)(scales[j] | mins[j] << 4);
        float step = float_from_half(d) * (to[j] & 15);
        if (step == 0)
            searched_affine(x + 16 * j, 16, 3, found->step[j], found->base[j], quants + 16 * j);
        else
            divide(x + 16 * j, 16, step, float_from_half(dmin) * (to[j] >> 4), 0, 3, 0, quants + 16 * j);
    }
    pack_two_bits(quants, to + 16);
    put_half(to + 80, d);
    put_half(to + 82, dmin);
}

static int64_t quantize_q2_k(const float *x, uint8_t *out, const float *importance, int64_t total, int64_t per_row,
                             chunk_function ggml) {
    affine_t plain = {3, -0.5f, COARSE_STEP, 15, 1, ABSOLUTE};
    affine_t weighted = {3, -0.9f, FINE_STEP, 36, 0, IMPORTANCE_AND_SIGMA};
    int64_t handed_over = 0;
    for (int64_t first = 0; first < total; first += UNIT) {
        batch_t batch = batch_at(x, importance, first, total, per_row);
        found_t found[UNIT];
        shared_t shared;
        uint32_t odd = 0;
        if (importance) {
            search_batch_affine(&batch, 16, weighted, 1, found);
            odd = share_batch(&batch, 16, 15, found, &shared);
        } else {
            search_batch_affine(&batch, 16, plain, 0, found);
        }
        for (int s = 0; s < batch.count; s++) {
            uint8_t *to = out + (first + s) * 84;
            if (found[s].odd || (odd >> s & 1)) {
                ggml(10, batch.x[s], to, 0, 1, SUPER, batch.importance[s]);
                handed_over++;
                continue;
            }
            if (!importance) {
                shared.scale[s] = share_plainly(found[s].scale, 16, 15, 255, shared.scales[s]);
                shared.min[s] = share_plainly(found[s].min, 16, 15, 255, shared.mins[s]);
            }
            write_q2(batch.x[s], &found[s], shared.scale[s], shared.min[s], shared.scales[s], shared.mins[s], to);
        }
    }
    return handed_over;
}

/* ---- Q3_K ------------------------------------------------------------------------------------------------------- */

/* 32 bytes of third bits, 64 of two bits, 12 of 6-bit scales, d. `plain` has what search_stepwise chose, or is NULL. */
static void write_q3(const float *x, const found_t *found, const float *plain, float scale, const int32_t *scales,
                     uint8_t *to) {
    int32_t quants[SUPER];
    uint16_t d = half_from_float(scale);
    memset(to, 0, 110);
    for (int j = 0; j < 16; j++) {
        to[96 + j % 8] |= (uint8_t)((scales[j] & 15) << j / 8 * 4);
        to[104 + j % 4] |= (uint8_t)(scales[j] >> 4 << j / 4 * 2);
        float step = float_from_half(d) * (float)(scales[j] - 32);
        int32_t *q = quants + 16 * j;
        if (step != 0)
            divide(x + 16 * j, 16, step, 0, -4, 3, 4, q);
        else if (plain)
            for (int i = 0; i < 16; i++) q[i] = (int32_t)plain[i * UNIT + j];
        else
            searched_symmetric(x + 16 * j, 16, 4, found->step[j], q);
    }
    for (int l = 0; l < 32; l++) {
        int high = 0;
        for (int j = 0; j < 8; j++) high |= (quants[32 * j + l] >> 2) << j;
        to[l] = (uint8_t)high;
    }
    pack_two_bits(quants, to + 32);
    put_half(to + 108, d);
}

static float share_symmetrically(const float *values, int32_t *scales) {
    float size = 0, max = 0;
    for (int j = 0; j < 16; j++)
        if (fabsf(values[j]) > size) size = fabsf(values[j]), max = values[j];
    if (max == 0) {
        memset(scales, 0, 16 * sizeof *scales);
        return 0;
    }
    float inverse = -32.0f / max;
    for (int j = 0; j < 16; j++) {
        int8_t l = (int8_t)nearest_int(inverse * values[j]);
        scales[j] = (l < -32 ? -32 : l > 31 ? 31 : l) + 32;
    }
    return 1 / inverse;
}

static int64_t quantize_q3_k_plainly(const float *x, uint8_t *out, int64_t total, chunk_function ggml) {
    int64_t handed_over = 0;
    for (int64_t block = 0; block < total; block++, x += SUPER, out += 110) {
        const float *rows[UNIT];
        float quants[16 * UNIT];
        int32_t scales[16];
        found_t found;
        found.odd = 0;
        sub_blocks(&x, 0, 16, rows);
        for (int at = 0; at < UNIT; at += LANES) search_stepwise(16, 4, rows, at, &found, quants);
        if (found.odd) {
            ggml(11, x, out, 0, 1, SUPER, 0);
            handed_over++;
        } else {
            float scale = share_symmetrically(found.scale, scales);
            write_q3(x, &found, quants, scale, scales, out);
        }
    }
    return handed_over;
}

static int64_t quantize_q3_k(const float *x, uint8_t *out, const float *importance, int64_t total, int64_t per_row,
                             chunk_function ggml) {
    if (!importance) return quantize_q3_k_plainly(x, out, total, ggml);
    int64_t handed_over = 0;
    for (int64_t first = 0; first < total; first += UNIT) {
        batch_t batch = batch_at(x, importance, first, total, per_row);
        found_t found[UNIT], shared;
        float sums[UNIT], sigma2[UNIT], values[2][UNIT][16];
        const float *rows[UNIT], *weights[UNIT];
        sums_of_squares(&batch, sums);
        for (int s = 0; s < batch.count; s++) {
            for (int j = 0; j < UNIT; j++) sigma2[j] = 2 * sums[s] / SUPER;
            sub_blocks(batch.x, s, 16, rows);
            sub_blocks(batch.importance, s, 16, weights);
            found[s].odd = 0;
            for (int at = 0; at < UNIT; at += LANES)
                search_symmetric(16, 4, IMPORTANCE_AND_SIGMA, rows, weights, sigma2, at, &found[s]);
        }
        gather(&batch, 16, found, SCALE, values[0], rows);
        gather(&batch, 16, found, WEIGHT, values[1], weights);
        shared.odd = 0;
        for (int at = 0; at < UNIT; at += LANES) search_symmetric(16, 32, IMPORTANCE, rows, weights, 0, at, &shared);
        for (int s = 0; s < batch.count; s++) {
            uint8_t *to = out + (first + s) * 110;
            int32_t scales[16];
            if (found[s].odd || (shared.odd >> s & 1)) {
                ggml(11, batch.x[s], to, 0, 1, SUPER, batch.importance[s]);
                handed_over++;
                continue;
            }
            searched_symmetric(values[0][s], 16, 32, shared.step[s], scales);
            write_q3(batch.x[s], &found[s], 0, shared.scale[s], scales, to);
        }
    }
    return handed_over;
}

/* ---- IQ4_XS ----------------------------------------------------------------------------------------------------- */

INLINE void pack_nibbles(const int32_t *quants, uint8_t *to) {
    for (int l = 0; l < 16; l++) to[l] = (uint8_t)((quants[l] & 15) | (quants[l + 16] & 15) << 4);
}

/* d, 2 bytes of the high two bits of eight scales, 4 of their low four bits, 128 bytes of level numbers. */
static void write_iq4_xs(const float *x, const float *values, uint8_t *to) {
    int32_t quants[32];
    float size = 0, max = 0;
    for (int j = 0; j < 8; j++)
        if (fabsf(values[j]) > size) size = fabsf(values[j]), max = values[j];
    float d = -max / 32, inverse = d != 0 ? 1 / d : 0;
    memset(to, 0, 8);
    put_half(to, half_from_float(d));
    for (int j = 0; j < 8; j++) {
        int l = nearest_int(inverse * values[j]);
        l = l < -32 ? -32 : l > 31 ? 31 : l;
        float step = d * (float)l;
        number_levels(x + 32 * j, 32, step != 0 ? 1 / step : 0, quants);
        pack_nibbles(quants, to + 8 + 16 * j);
        l += 32;
        to[4 + j / 2] |= (uint8_t)((l & 15) << j % 2 * 4);
        to[2 + j / 4] |= (uint8_t)(l >> 4 << j % 4 * 2);
    }
}

static int64_t quantize_iq4_xs(const float *x, uint8_t *out, const float *importance, int64_t total, int64_t per_row,
                               chunk_function ggml) {
    int64_t handed_over = 0;
    for (int64_t first = 0; first < total; first += UNIT) {
        batch_t batch = batch_at(x, importance, first, total, per_row);
        float sums[UNIT], sigma2[UNIT];
        if (importance) sums_of_squares(&batch, sums);
        for (int s = 0; s < batch.count; s += 2) {
            const float *rows[UNIT], *weights[UNIT];
            found_t found;
            found.odd = 0;
            sub_blocks(batch.x, s, 32, rows);
            if (importance) {
                sub_blocks(batch.importance, s, 32, weights);
                for (int j = 0; j < UNIT; j++) sigma2[j] = sums[s + j / 8] * (2.0f / SUPER);
            }
            for (int at = 0; at < UNIT; at += LANES) {
                if (importance)
                    search_levels(32, IMPORTANCE_AND_SIGMA, rows, weights, sigma2, at, &found);
                else
                    search_levels(32, SQUARED, rows, 0, 0, at, &found);
            }
            for (int k = s; k < s + 2 && k < batch.count; k++) {
                uint8_t *to = out + (first + k) * 136;
                if (found.odd >> k % 2 * 8 & 255) {
                    ggml(23, batch.x[k], to, 0, 1, SUPER, batch.importance[k]);
                    handed_over++;
                } else {
                    write_iq4_xs(batch.x[k], found.scale + k % 2 * 8, to);
                }
            }
        }
    }
    return handed_over;
}

/* ---- blocks of 32 values ---------------------------------------------------------------------------------------- */

typedef struct {
    int type, bytes, nmax;
} simple_t;

/* d, m (Q4_1, Q5_1), 4 bytes of fifth bits (Q5_0, Q5_1), 16 bytes of four bits. */
INLINE void write_simple(simple_t how, const float *x, const found_t *found, int at, uint8_t *to) {
    int32_t quants[32];
    put_half(to, half_from_float(found->scale[at]));
    to += 2;
    if (how.type == 20) {
        number_levels(x, 32, found->scale[at] != 0 ? 1 / found->scale[at] : 0, quants);
    } else if (how.type == 3 || how.type == 7) {
        put_half(to, half_from_float(-found->min[at]));
        to += 2;
        searched_affine(x, 32, how.nmax, found->step[at], found->base[at], quants);
    } else {
        searched_symmetric(x, 32, how.nmax, found->step[at], quants);
    }
    if (how.type == 6 || how.type == 7) {
        uint32_t high = 0;
        for (int l = 0; l < 32; l++) high |= (uint32_t)(quants[l] >> 4 & 1) << l;
        memcpy(to, &high, 4);
        to += 4;
    }
    pack_nibbles(quants, to);
}

/* Rows one by one, for sigma2 is that of a row. A row with one odd block is handed over whole. */
INLINE int64_t quantize_simple(simple_t how, const float *x, uint8_t *out, const float *importance, int64_t n_rows,
                               int64_t n_cols, chunk_function ggml) {
    int64_t blocks = n_cols / 32, handed_over = 0;
    for (int64_t row = 0; row < n_rows; row++, x += n_cols, out += blocks * how.bytes) {
        uint32_t odd = 0;
        float sum = 0, sigma2[UNIT];
        if (importance && how.type != 20)
            for (int64_t i = 0; i < n_cols; i++) sum += x[i] * x[i];
        for (int j = 0; j < UNIT; j++) sigma2[j] = sum / (float)n_cols;
        for (int64_t first = 0; first < blocks && !odd; first += UNIT) {
            const float *rows[UNIT], *weights[UNIT];
            found_t found;
            found.odd = 0;
            for (int j = 0; j < UNIT; j++) {
                int64_t block = first + j < blocks ? first + j : blocks - 1;
                rows[j] = x + block * 32;
                weights[j] = importance ? importance + block * 32 : 0;
            }
            for (int at = 0; at < UNIT; at += LANES) {
                if (how.type == 20 && !importance)
                    search_levels(32, SQUARED, rows, 0, 0, at, &found);
                else if (how.type == 20)
                    search_levels(32, IMPORTANCE_AND_OWN_SIGMA, rows, weights, 0, at, &found);
                else if (how.type == 3 || how.type == 7)
                    search_affine(32, (float)how.nmax, -0.9f, FINE_STEP, 36, 0, IMPORTANCE_AND_SIGMA, rows, weights, sigma2,
                                  at, &found);
                else
                    search_symmetric(32, (float)how.nmax, IMPORTANCE_AND_SIGMA, rows, weights, sigma2, at, &found);
            }
            odd = found.odd;
            for (int j = 0; j < UNIT && first + j < blocks; j++)
                write_simple(how, rows[j], &found, j, out + (first + j) * how.bytes);
        }
        if (odd) {
            ggml(how.type, x, out, 0, 1, n_cols, importance);
            handed_over++;
        }
    }
    return handed_over;
}

/* d, 32 signed bytes. */
static int64_t quantize_q8_0(const float *x, uint8_t *out, int64_t blocks, chunk_function ggml) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    int64_t handed_over = 0;
    for (int64_t block = 0; block < blocks; block++, x += 32, out += 34) {
        vi sizes = {0};
        for (int i = 0; i < 32; i += LANES) sizes = imax(sizes, (vi)absolute(load(x + i)));
        float size = float_from_bits((uint32_t)largest(sizes));
        /* A NaN is the largest of all, and fails both comparisons. */
        if (size != 0 && !(size >= NARROWEST && size < LARGEST)) {
            ggml(8, x, out, 0, 1, 32, 0);
            handed_over++;
            continue;
        }
        float d = size / 127, inverse = d != 0 ? 1 / d : 0;
        put_half(out, half_from_float(d));
        for (int i = 0; i < 32; i += LANES) {
            vf v = inverse * load(x + i);
            /* roundf: halves away from zero. Adding 0.5 itself would round 0.49999997 up. */
            vf half = (vf)(((vi)v & INT32_MIN) | (vi)splat(BELOW_HALF));
            bytes quants = __builtin_convertvector(__builtin_convertvector(v + half, vi), bytes);
            memcpy(out + 2 + i, &quants, sizeof quants);
        }
    }
    return handed_over;
}

/* ---- half floats and bfloat16 ----------------------------------------------------------------------------------- */

typedef int16_t shorts __attribute__((vector_size(2 * LANES)));

INLINE vi halves(vi u) {
    vi sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
    vi normal = (size + 0xfff + (size >> 13 & TIES_TO_EVEN) - (112 << 23)) >> 13;
    vi small = (vi)((vf)size + 0.5f) - 0x3f000000, is_small = size < 0x38800000;
    vi h = (is_small & small) | (~is_small & normal), is_large = size >= 0x477ff000, is_nan = size > 0x7f800000;
    h = (is_large & 0x7c00) | (~is_large & h);
    return sign | (is_nan & 0x7e00) | (~is_nan & h);
}

INLINE vi brains(vi u) {
    vi is_nan = (u & 0x7fffffff) > 0x7f800000;
    vi near = (u + 0x7fff + (u >> 16 & TIES_TO_EVEN)) >> 16;
    return (is_nan & (u >> 16 | 64)) | (~is_nan & near);
}

INLINE int64_t cast_rows(int to_half, const float *x, uint8_t *out, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        int count = n - i < LANES ? (int)(n - i) : LANES;
        vi u = {0};
        if (count == LANES)
            memcpy(&u, x + i, sizeof u);
        else
            memcpy(&u, x + i, (size_t)count * 4);
        shorts h = __builtin_convertvector(to_half ? halves(u) : brains(u), shorts);
        if (count == LANES)
            memcpy(out + 2 * i, &h, sizeof h);
        else
            memcpy(out + 2 * i, &h, (size_t)count * 2);
    }
    return 0;
}

/* ---- entry ------------------------------------------------------------------------------------------------------ */

/* Encodes n_rows rows of n_cols floats as ggml_type `type`. `importance` has n_cols floats or is NULL; `ggml` is
 * ggml_quantize_chunk. Returns how many blocks, super-blocks or rows were left to it, or -1 for a type not made here. */
int64_t kquants_quantize(int type, const float *x, uint8_t *out, int64_t n_rows, int64_t n_cols, const float *importance,
                         chunk_function ggml) {
    int64_t per_row = n_cols / SUPER, total = n_rows * per_row;
    switch (type) {
    case 1: return cast_rows(1, x, out, n_rows * n_cols);
    case 2: case 3: case 6: case 7:
        if (importance) break;
        /* llama.cpp's own are fast enough without an importance matrix. */
        if (n_rows > 0) ggml(type, x, out, 0, n_rows, n_cols, 0);
        return n_rows;
    case 8: return quantize_q8_0(x, out, n_rows * n_cols / 32, ggml);
    case 10: return quantize_q2_k(x, out, importance, total, per_row, ggml);
    case 11: return quantize_q3_k(x, out, importance, total, per_row, ggml);
    case 12: return quantize_q4_k(x, out, importance, total, per_row, ggml);
    case 13: return quantize_q5_k(x, out, importance, total, per_row, ggml);
    case 14: return quantize_q6_k(x, out, importance, total, per_row, ggml);
    case 23: return quantize_iq4_xs(x, out, importance, total, per_row, ggml);
    case 30: return cast_rows(0, x, out, n_rows * n_cols);
    }
    switch (type) {
    case 2: return quantize_simple((simple_t){2, 18, 8}, x, out, importance, n_rows, n_cols, ggml);
    case 3: return quantize_simple((simple_t){3, 20, 15}, x, out, importance, n_rows, n_cols, ggml);
    case 6: return quantize_simple((simple_t){6, 22, 16}, x, out, importance, n_rows, n_cols, ggml);
    case 7: return quantize_simple((simple_t){7, 24, 31}, x, out, importance, n_rows, n_cols, ggml);
    case 20: return quantize_simple((simple_t){20, 18, 0}, x, out, importance, n_rows, n_cols, ggml);
    }
    return -1;
}

static size_t no_chunk(int type, const float *x, void *out, int64_t start, int64_t n_rows, int64_t n_cols,
                       const float *importance) {
    (void)type, (void)x, (void)out, (void)start, (void)importance;
    return (size_t)(n_rows * n_cols);
}

/* Runs every type once. A processor that lacks an instruction ends the process here, which is why a process of its own
 * calls this. */
int kquants_try(void) {
    float x[2 * SUPER], importance[SUPER];
    uint8_t out[4 * SUPER];
    for (int i = 0; i < 2 * SUPER; i++) x[i] = (float)(i * 37 % 101 - 50), importance[i % SUPER] = (float)(i % 7);
    for (int type = 0; type < 32; type++) {
        kquants_quantize(type, x, out, 2, SUPER, 0, no_chunk);
        kquants_quantize(type, x, out, 2, SUPER, importance, no_chunk);
    }
    return 0;
}
