/* IQ4_XS, whose quants number levels; types with blocks of 32 values; 16-bit floats. */
#pragma once

#include "superblocks.h"

/* ---- IQ4_XS ------------------------------------------------------------------------------------------------------ */

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
                uint8_t *to = out + (first + k) * IQ4_XS_BYTES;
                if (found.odd >> k % 2 * 8 & 255) {
                    ggml(IQ4_XS, batch.x[k], to, 0, 1, SUPER, batch.importance[k]);
                    handed_over++;
                } else {
                    write_iq4_xs(batch.x[k], found.scale + k % 2 * 8, to);
                }
            }
        }
    }
    return handed_over;
}

/* ---- blocks of 32 values ----------------------------------------------------------------------------------------- */

typedef struct {
    int type, bytes, nmax;
} simple_t;

/* d, m (Q4_1, Q5_1), 4 bytes of fifth bits (Q5_0, Q5_1), 16 bytes of four bits. */
INLINE void write_simple(simple_t how, const float *x, const found_t *found, int at, uint8_t *to) {
    int32_t quants[32];
    put_half(to, half_from_float(found->scale[at]));
    to += 2;
    if (how.type == IQ4_NL) {
        number_levels(x, 32, found->scale[at] != 0 ? 1 / found->scale[at] : 0, quants);
    } else if (how.type == Q4_1 || how.type == Q5_1) {
        put_half(to, half_from_float(-found->min[at]));
        to += 2;
        searched_affine(x, 32, how.nmax, found->step[at], found->base[at], quants);
    } else {
        searched_symmetric(x, 32, how.nmax, found->step[at], quants);
    }
    if (how.type == Q5_0 || how.type == Q5_1) {
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
    affine_t weighted = {(float)how.nmax, -0.9f, FINE_STEP, 36, 0, IMPORTANCE_AND_SIGMA};
    int64_t blocks = n_cols / 32, handed_over = 0;
    for (int64_t row = 0; row < n_rows; row++, x += n_cols, out += blocks * how.bytes) {
        uint32_t odd = 0;
        float sum = 0, sigma2[UNIT];
        if (importance && how.type != IQ4_NL)
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
                if (how.type == IQ4_NL && !importance)
                    search_levels(32, SQUARED, rows, 0, 0, at, &found);
                else if (how.type == IQ4_NL)
                    search_levels(32, IMPORTANCE_AND_OWN_SIGMA, rows, weights, 0, at, &found);
                else if (how.type == Q4_1 || how.type == Q5_1)
                    search_affine(32, weighted, rows, weights, sigma2, at, &found);
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

/* Without an importance matrix llama.cpp's own are fast. */
static int64_t leave(int type, const float *x, uint8_t *out, int64_t n_rows, int64_t n_cols, chunk_function ggml) {
    if (n_rows > 0) ggml(type, x, out, 0, n_rows, n_cols, 0);
    return n_rows;
}

static int64_t quantize_q4_0(const float *x, uint8_t *out, const float *importance, int64_t n_rows, int64_t n_cols,
                             chunk_function ggml) {
    if (!importance) return leave(Q4_0, x, out, n_rows, n_cols, ggml);
    return quantize_simple((simple_t){Q4_0, Q4_0_BYTES, 8}, x, out, importance, n_rows, n_cols, ggml);
}

static int64_t quantize_q4_1(const float *x, uint8_t *out, const float *importance, int64_t n_rows, int64_t n_cols,
                             chunk_function ggml) {
    if (!importance) return leave(Q4_1, x, out, n_rows, n_cols, ggml);
    return quantize_simple((simple_t){Q4_1, Q4_1_BYTES, 15}, x, out, importance, n_rows, n_cols, ggml);
}

static int64_t quantize_q5_0(const float *x, uint8_t *out, const float *importance, int64_t n_rows, int64_t n_cols,
                             chunk_function ggml) {
    if (!importance) return leave(Q5_0, x, out, n_rows, n_cols, ggml);
    return quantize_simple((simple_t){Q5_0, Q5_0_BYTES, 16}, x, out, importance, n_rows, n_cols, ggml);
}

static int64_t quantize_q5_1(const float *x, uint8_t *out, const float *importance, int64_t n_rows, int64_t n_cols,
                             chunk_function ggml) {
    if (!importance) return leave(Q5_1, x, out, n_rows, n_cols, ggml);
    return quantize_simple((simple_t){Q5_1, Q5_1_BYTES, 31}, x, out, importance, n_rows, n_cols, ggml);
}

static int64_t quantize_iq4_nl(const float *x, uint8_t *out, const float *importance, int64_t n_rows, int64_t n_cols,
                               chunk_function ggml) {
    return quantize_simple((simple_t){IQ4_NL, IQ4_NL_BYTES, 0}, x, out, importance, n_rows, n_cols, ggml);
}

/* d, 32 signed bytes. */
static int64_t quantize_q8_0(const float *x, uint8_t *out, int64_t blocks, chunk_function ggml) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    int64_t handed_over = 0;
    for (int64_t block = 0; block < blocks; block++, x += 32, out += Q8_0_BYTES) {
        vi sizes = {0};
        for (int i = 0; i < 32; i += LANES) sizes = imax(sizes, (vi)absolute(load(x + i)));
        float size = float_from_bits((uint32_t)largest(sizes));
        /* A NaN is the largest of all, and fails both comparisons. */
        if (size != 0 && !(size >= NARROWEST && size < LARGEST)) {
            ggml(Q8_0, x, out, 0, 1, 32, 0);
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

/* ---- half floats and bfloat16 ------------------------------------------------------------------------------------ */

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
