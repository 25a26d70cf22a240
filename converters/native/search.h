/* The searches of ggml/src/ggml-quants.c for the scale (and min) of a group of n values: a group a lane. */
#pragma once

#include "vectors.h"

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

/* Quants from 0 to nmax; the scales tried put the largest value at nmax + first, and then delta more, `steps` times. */
typedef struct {
    float nmax, first, delta;
    int steps, absolute_error;
    enum weighting kind;
} affine_t;

/* make_qkx2_quants and make_qkx3_quants: x = scale * quant + min. Each step starts from the min of the best so far. */
INLINE void search_affine(int n, affine_t how, const float *const *rows, const float *const *importance,
                          const float *sigma2, int at, found_t *found) {
    float nmax = how.nmax;
    vf x[32], w[32], quants[32];
    load_columns(rows + at, n, x);
    weigh(how.kind, n, x, importance ? importance + at : 0, sigma2 ? sigma2 + at : 0, w);
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
    vf best = error_of(n, how.absolute_error, scale, min, x, w, quants);
    for (int is = 0; is <= how.steps; is++) {
        vf sum_l, sum_l2, sum_xl;
        float levels = how.first + how.delta * is + nmax;
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
        vf error = error_of(n, how.absolute_error, this_scale, this_min, x, w, quants);
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
