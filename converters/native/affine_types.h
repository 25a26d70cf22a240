/* Q2_K, Q4_K and Q5_K: x = scale * quant + min in each sub-block. */
#pragma once

#include "superblocks.h"

/* ---- Q4_K and Q5_K ----------------------------------------------------------------------------------------------- */

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
    return quantize_q45(Q4_K, 15, Q4_K_BYTES, plain, x, out, importance, total, per_row, ggml);
}

static int64_t quantize_q5_k(const float *x, uint8_t *out, const float *importance, int64_t total, int64_t per_row,
                             chunk_function ggml) {
    affine_t plain = {31, -0.5f, COARSE_STEP, 15, 0, ABSOLUTE_AND_RMS};
    return quantize_q45(Q5_K, 31, Q5_K_BYTES, plain, x, out, importance, total, per_row, ggml);
}

/* ---- Q2_K -------------------------------------------------------------------------------------------------------- */

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
            uint8_t *to = out + (first + s) * Q2_K_BYTES;
            if (found[s].odd || (odd >> s & 1)) {
                ggml(Q2_K, batch.x[s], to, 0, 1, SUPER, batch.importance[s]);
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
