/* Q3_K and Q6_K: x = scale * quant in each sub-block. */
#pragma once

#include "superblocks.h"

/* ---- Q6_K -------------------------------------------------------------------------------------------------------- */

/* 128 bytes of four bits, 64 of two bits, 16 scales, d. */
static void write_q6(const float *x, const found_t *found, uint8_t *to) {
    int32_t quants[SUPER];
    float size = 0, max = 0;
    for (int j = 0; j < 16; j++) {
        float a = fabsf(found->scale[j]);
        if (a > size) size = a, max = found->scale[j];
    }
    if (size < NO_SCALE) {
        memset(to, 0, Q6_K_BYTES);
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
    for (int64_t block = 0; block < total; block++, x += SUPER, out += Q6_K_BYTES) {
        const float *rows[UNIT], *weights[UNIT];
        const float *block_importance = importance ? importance + block % per_row * SUPER : 0;
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
            ggml(Q6_K, x, out, 0, 1, SUPER, block_importance);
            handed_over++;
        } else {
            write_q6(x, &found, out);
        }
    }
    return handed_over;
}

/* ---- Q3_K -------------------------------------------------------------------------------------------------------- */

/* 32 bytes of third bits, 64 of two bits, 12 of 6-bit scales, d. `plain` has what search_stepwise chose, or is NULL. */
static void write_q3(const float *x, const found_t *found, const float *plain, float scale, const int32_t *scales,
                     uint8_t *to) {
    int32_t quants[SUPER];
    uint16_t d = half_from_float(scale);
    memset(to, 0, Q3_K_BYTES);
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
    for (int64_t block = 0; block < total; block++, x += SUPER, out += Q3_K_BYTES) {
        const float *rows[UNIT];
        float quants[16 * UNIT];
        int32_t scales[16];
        found_t found;
        found.odd = 0;
        sub_blocks(&x, 0, 16, rows);
        for (int at = 0; at < UNIT; at += LANES) search_stepwise(16, 4, rows, at, &found, quants);
        if (found.odd) {
            ggml(Q3_K, x, out, 0, 1, SUPER, 0);
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
            uint8_t *to = out + (first + s) * Q3_K_BYTES;
            int32_t scales[16];
            if (found[s].odd || (shared.odd >> s & 1)) {
                ggml(Q3_K, batch.x[s], to, 0, 1, SUPER, batch.importance[s]);
                handed_over++;
                continue;
            }
            searched_symmetric(values[0][s], 16, 32, shared.step[s], scales);
            write_q3(batch.x[s], &found[s], 0, shared.scale[s], scales, to);
        }
    }
    return handed_over;
}
