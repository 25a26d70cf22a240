/* Batches of super-blocks: where they lie, the search of all their sub-blocks, what these share, and final quants. */
#pragma once

#include "search.h"

/* ---- final quants, along the values of one sub-block ------------------------------------------------------------- */

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

/* Two bits of values that are 32 apart go into one byte. */
INLINE void pack_two_bits(const int32_t *quants, uint8_t *to) {
    for (int j = 0; j < SUPER; j += 128, to += 32)
        for (int l = 0; l < 32; l++) {
            const int32_t *q = quants + j + l;
            to[l] = (uint8_t)((q[0] & 3) | (q[32] & 3) << 2 | (q[64] & 3) << 4 | (q[96] & 3) << 6);
        }
}

/* ---- batches of super-blocks ------------------------------------------------------------------------------------- */

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
            search_affine(n, how, rows, importance, sigma2, at, found);
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
