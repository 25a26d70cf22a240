/* Float32 rows to GGUF blocks, with the bytes of llama.cpp's `ggml_quantize_chunk` and several times faster.
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
#include "affine_types.h"
#include "small_types.h"
#include "symmetric_types.h"

/* Encodes n_rows rows of n_cols floats as ggml_type `type`. `importance` has n_cols floats or is NULL; `ggml` is
 * ggml_quantize_chunk. Returns how many blocks, super-blocks or rows were left to it; -1 for a type not made here. */
int64_t kquants_quantize(int type, const float *x, uint8_t *out, int64_t n_rows, int64_t n_cols,
                         const float *importance, chunk_function ggml) {
    int64_t per_row = n_cols / SUPER, total = n_rows * per_row;
    switch (type) {
    case F16: return cast_rows(1, x, out, n_rows * n_cols);
    case BF16: return cast_rows(0, x, out, n_rows * n_cols);
    case Q8_0: return quantize_q8_0(x, out, n_rows * n_cols / 32, ggml);
    case Q2_K: return quantize_q2_k(x, out, importance, total, per_row, ggml);
    case Q3_K: return quantize_q3_k(x, out, importance, total, per_row, ggml);
    case Q4_K: return quantize_q4_k(x, out, importance, total, per_row, ggml);
    case Q5_K: return quantize_q5_k(x, out, importance, total, per_row, ggml);
    case Q6_K: return quantize_q6_k(x, out, importance, total, per_row, ggml);
    case IQ4_XS: return quantize_iq4_xs(x, out, importance, total, per_row, ggml);
    case IQ4_NL: return quantize_iq4_nl(x, out, importance, n_rows, n_cols, ggml);
    case Q4_0: return quantize_q4_0(x, out, importance, n_rows, n_cols, ggml);
    case Q4_1: return quantize_q4_1(x, out, importance, n_rows, n_cols, ggml);
    case Q5_0: return quantize_q5_0(x, out, importance, n_rows, n_cols, ggml);
    case Q5_1: return quantize_q5_1(x, out, importance, n_rows, n_cols, ggml);
    default: return -1;
    }
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
    for (int type = 0; type <= BF16; type++) {
        kquants_quantize(type, x, out, 2, SUPER, 0, no_chunk);
        kquants_quantize(type, x, out, 2, SUPER, importance, no_chunk);
    }
    return 0;
}
