/* Low-rank adapters in llama.cpp's compute graph, each row of a batch with its own.
 *
 * The LoRA that is set is a socket: of rank 1, zeros. Before a graph is computed, its evaluation callback is asked about
 * every node; `lowrank_on_node` then turns the first and the last of the four that a matrix has (graph.h) into custom
 * operations, which compute on our own weights, and the two between them into none. Nothing is called back while the graph
 * is computed.
 *
 * A row's arithmetic is the same whatever its neighbours are and however many: the same bits alone and in any batch.
 *
 * License: Apache-2.0, as the rest of edgelora.
 */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "graph.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define TILE 32 /* columns of B that lie together, rank by rank */
#define ROWS 4  /* rows computed with one reading of the weights */
#define RANKS (LANES == 8 ? 2 : 4) /* of A, computed with one reading of those rows: as many sums as there are registers for */
#define RANKS_OF_ONE 8             /* and for a row alone: its sums do not wait for each other */
#define MAX_SUMS 16

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* What one adapter has for one matrix. `a` is (rank, n_in); `b` is (n_out / TILE, rank, TILE). */
typedef struct {
    const void *a, *b;
    int32_t rank, type; /* rank 0: nothing */
    float factor;       /* of every scale: alpha / rank */
} pair;

/* One adapter of a row: its pairs, a matrix each; where its hidden values begin in the row's. */
typedef struct {
    const pair *pairs;
    float scale;
    int32_t offset;
} part;

/* Rows that follow each other and are computed alike. */
typedef struct {
    int32_t row, n_rows, part, n_parts;
} run;

typedef struct {
    const run *runs;
    int32_t n_runs, n_rows;
} table;

struct mixer;

typedef struct {
    struct mixer *mixer;
    int32_t n_in, n_out;
    int32_t table, seen; /* which table the rows of this decode follow; how often its nodes were found */
} matrix;

typedef struct mixer {
    names names; /* of the matrices */
    matrix *matrices;
    table tables[2]; /* of all tokens, and of those whose logits are wanted */
    const part *parts;
    int32_t n_parts, stride; /* parts in all; floats of a row in `hidden` */
    float *hidden;           /* (n_rows, stride) */
    int32_t custom, broken;  /* GGML_OP_CUSTOM; the first matrix whose nodes are not as expected, plus 1 */
    int32_t custom_params[16], user_at; /* its parameters, the function first, and where among them the user's pointer is */
    int32_t current, stage; /* the matrix whose four nodes are being met, and which of them was the last; 0: none is */
    tensor *last;
} mixer;

typedef void (*custom_function)(tensor *, int, int, void *);

INLINE floats load_floats(const float *from) { return *(const floats *)from; }

INLINE floats broadcast(float value) {
    floats all = {0};
    return all + value;
}

INLINE floats widen(int type, const void *from) {
    if (type == F32) return load_floats(from);
#if defined(__AVX512F__)
    if (type == F16) return (floats)_mm512_cvtph_ps(_mm256_loadu_si256(from));
#elif defined(__F16C__)
    if (type == F16) return (floats)_mm256_cvtph_ps(_mm_loadu_si128(from));
#endif
    words bits = __builtin_convertvector(*(const halves *)from, words);
    if (type == BF16) return (floats)(bits << 16);
    /* exact for every finite half, the subnormal ones too */
    return (floats)((bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13) * broadcast(0x1p112f);
}

INLINE float widen_one(int type, const void *from) {
    union { uint32_t bits; float value; } to;
    if (type == F32) return *(const float *)from;
    uint32_t half = *(const uint16_t *)from;
    if (type == BF16) {
        to.bits = half << 16;
        return to.value;
    }
    to.bits = (half & 0x8000u) << 16 | (half & 0x7fffu) << 13;
    return to.value * 0x1p112f;
}

INLINE size_t size_of(int type) { return type == F32 ? 4 : 2; }

INLINE float total(const floats *sums) {
    float halving[LANES];
    memcpy(halving, sums, sizeof halving);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) halving[i] += halving[i + width];
    return halving[0];
}

/* The dot products of `ranks` rows of A with `n` rows of x; each is summed in the same order whatever the two are. */
INLINE void dots(int type, const char *a, int ranks, const float *x, int n, int64_t n_in, float *out, int64_t step) {
    floats sums[MAX_SUMS];
    int64_t k = 0;
    for (int s = 0; s < ranks * n; s++) sums[s] = broadcast(0);
    for (; k + LANES <= n_in; k += LANES)
        for (int r = 0; r < ranks; r++) {
            floats weight = widen(type, a + (r * n_in + k) * size_of(type));
            for (int i = 0; i < n; i++) sums[r * n + i] += weight * load_floats(x + i * n_in + k);
        }
    for (int r = 0; r < ranks && k < n_in; r++) { /* the rest, filled up with zeros: as vectors, every compilation rounds it alike */
        float weights[LANES] = {0}, values[LANES];
        for (int64_t at = k; at < n_in; at++) weights[at - k] = widen_one(type, a + (r * n_in + at) * size_of(type));
        for (int i = 0; i < n; i++) {
            memset(values, 0, sizeof values);
            memcpy(values, x + i * n_in + k, (n_in - k) * sizeof(float));
            sums[r * n + i] += load_floats(weights) * load_floats(values);
        }
    }
    for (int r = 0; r < ranks; r++)
        for (int i = 0; i < n; i++) out[i * step + r] = total(&sums[r * n + i]);
}

INLINE void hidden_values(int type, const matrix *m, const pair *p, const float *x, const run *r, int from, int to, float *hidden) {
    const int64_t n_in = m->n_in, stride = m->mixer->stride;
    for (int row = 0; row < r->n_rows;) {
        const int n = r->n_rows - row >= ROWS ? ROWS : 1, most = n == ROWS ? RANKS : RANKS_OF_ONE;
        for (int rank = from; rank < to;) {
            const char *a = (const char *)p->a + rank * n_in * size_of(type);
            const float *rows = x + (r->row + row) * n_in;
            float *out = hidden + (r->row + row) * stride + rank;
            const int ranks = to - rank >= most ? most : 1;
            if (n == ROWS && ranks == RANKS) dots(type, a, RANKS, rows, ROWS, n_in, out, stride);
            else if (n == ROWS) dots(type, a, 1, rows, ROWS, n_in, out, stride);
            else if (ranks == RANKS_OF_ONE) dots(type, a, RANKS_OF_ONE, rows, 1, n_in, out, stride);
            else dots(type, a, 1, rows, 1, n_in, out, stride);
            rank += ranks;
        }
        row += n;
    }
}

/* hidden = A x: the ranks of all runs are dealt out to the threads. */
static void down(tensor *node, int ith, int nth, void *user) {
    const matrix *m = user;
    const mixer *all = m->mixer;
    const table *rows = &all->tables[m->table];
    const int index = (int)(m - all->matrices);
    int64_t units = 0, at = 0;
    for (int i = 0; i < rows->n_runs; i++)
        for (int j = 0; j < rows->runs[i].n_parts; j++) units += all->parts[rows->runs[i].part + j].pairs[index].rank;
    const int64_t first = units * ith / nth, last = units * (ith + 1) / nth;
    const float *x = node->src[1]->data;
    for (int i = 0; i < rows->n_runs; i++)
        for (int j = 0; j < rows->runs[i].n_parts; j++) {
            const part *one = &all->parts[rows->runs[i].part + j];
            const pair *p = &one->pairs[index];
            int64_t from = first - at, to = last - at;
            at += p->rank;
            if (from < 0) from = 0;
            if (to > p->rank) to = p->rank;
            if (from >= to) continue;
            float *hidden = all->hidden + one->offset;
            if (p->type == F16) hidden_values(F16, m, p, x, &rows->runs[i], from, to, hidden);
            else if (p->type == BF16) hidden_values(BF16, m, p, x, &rows->runs[i], from, to, hidden);
            else hidden_values(F32, m, p, x, &rows->runs[i], from, to, hidden);
        }
}

/* sum += scale B hidden, for `n` rows and one tile of columns. */
INLINE void add_tile(int type, const char *b, int rank, const float *hidden, int64_t stride, int n, float scale, float sum[ROWS][TILE]) {
    floats change[ROWS][TILE / LANES];
    for (int i = 0; i < n; i++)
        for (int v = 0; v < TILE / LANES; v++) change[i][v] = broadcast(0);
    for (int r = 0; r < rank; r++)
        for (int v = 0; v < TILE / LANES; v++) {
            floats weight = widen(type, b + (r * TILE + v * LANES) * size_of(type));
            for (int i = 0; i < n; i++) change[i][v] += weight * broadcast(hidden[i * stride + r]);
        }
    for (int i = 0; i < n; i++)
        for (int v = 0; v < TILE / LANES; v++) {
            floats *to = (floats *)(sum[i] + v * LANES);
            *to += broadcast(scale) * change[i][v];
        }
}

INLINE void sum_tile(const matrix *m, const run *r, int row, int n, int tile, const float *from, float *to) {
    const mixer *all = m->mixer;
    const int index = (int)(m - all->matrices), column = tile * TILE;
    const int width = m->n_out - column < TILE ? m->n_out - column : TILE;
    float sum[ROWS][TILE] __attribute__((aligned(64)));
    for (int i = 0; i < n; i++) {
        if (width < TILE) memset(sum[i], 0, sizeof sum[i]);
        memcpy(sum[i], from + (int64_t)(row + i) * m->n_out + column, width * sizeof(float));
    }
    for (int j = 0; j < r->n_parts; j++) {
        const part *one = &all->parts[r->part + j];
        const pair *p = &one->pairs[index];
        const char *b = (const char *)p->b + (int64_t)tile * p->rank * TILE * size_of(p->type);
        const float *hidden = all->hidden + (int64_t)row * all->stride + one->offset;
        const float scale = one->scale * p->factor;
        if (!p->rank) continue;
        if (p->type == F16) add_tile(F16, b, p->rank, hidden, all->stride, n, scale, sum);
        else if (p->type == BF16) add_tile(BF16, b, p->rank, hidden, all->stride, n, scale, sum);
        else add_tile(F32, b, p->rank, hidden, all->stride, n, scale, sum);
    }
    for (int i = 0; i < n; i++) memcpy(to + (int64_t)(row + i) * m->n_out + column, sum[i], width * sizeof(float));
}

/* sum = W x + scale B hidden: the tiles of columns are dealt out to the threads. */
static void up(tensor *node, int ith, int nth, void *user) {
    const matrix *m = user;
    const table *rows = &m->mixer->tables[m->table];
    const int tiles = (m->n_out + TILE - 1) / TILE;
    const float *from = node->src[0]->data;
    float *to = node->data;
    for (int i = 0; i < rows->n_runs; i++) {
        const run *r = &rows->runs[i];
        if (!r->n_parts && from == to) continue;
        for (int row = 0; row < r->n_rows;) { /* B stays in the cache; the rows, which do not, are read along */
            const int n = r->n_rows - row >= ROWS ? ROWS : 1;
            for (int tile = tiles * ith / nth; tile < tiles * (ith + 1) / nth; tile++)
                if (n == ROWS) sum_tile(m, r, r->row + row, ROWS, tile, from, to);
                else sum_tile(m, r, r->row + row, 1, tile, from, to);
            row += n;
        }
    }
}

static bool has_rows(const tensor *t, int64_t width) {
    return t && t->type == F32 && t->ne[0] == width && t->nb[0] == 4 && t->nb[1] == (size_t)width * 4 &&
           t->nb[2] == t->nb[1] * t->ne[1] && t->nb[3] == t->nb[2] * t->ne[2];
}

static void make_custom(const mixer *all, tensor *node, custom_function function, void *user) {
    node->op = all->custom;
    memcpy(node->op_params, all->custom_params, sizeof node->op_params);
    memcpy(node->op_params, &function, sizeof function);
    memcpy((char *)node->op_params + all->user_at, &user, sizeof user);
}

static bool is_active(const mixer *all, int index) {
    for (int i = 0; i < all->n_parts; i++)
        if (all->parts[i].pairs[index].rank) return true;
    return false;
}

static void met(mixer *all, tensor *node, int stage) {
    all->last = node;
    all->stage = stage;
}

static void on_hidden(mixer *all, tensor *node, int index) {
    matrix *m = &all->matrices[index];
    const tensor *x = node->src[1];
    const int64_t rows = x ? x->ne[1] * x->ne[2] * x->ne[3] : -1;
    all->current = index;
    met(all, node, 1);
    m->table = rows == all->tables[0].n_rows ? 0 : 1;
    if (!has_rows(x, m->n_in) || rows != all->tables[m->table].n_rows) all->broken = index + 1;
    else if (is_active(all, index)) make_custom(all, node, down, m);
    else node->op = 0;
}

static void on_sum(mixer *all, tensor *node) {
    matrix *m = &all->matrices[all->current];
    const tensor *product = node->src[0];
    met(all, NULL, 0);
    m->seen++;
    if (!has_rows(node, m->n_out) || !has_rows(product, m->n_out)) all->broken = all->current + 1;
    else if (is_active(all, all->current) || node->data != product->data) make_custom(all, node, up, m);
    else node->op = 0;
}

/* llama.cpp's cb_eval, with a mixer. It wants no node's values, so the whole graph is computed at once afterwards. */
bool lowrank_on_node(tensor *node, bool ask, void *user) {
    mixer *all = user;
    if (!ask || !all->names.count || all->broken || !node->src[0]) return !ask;
    int found = find(&all->names, node->src[0], 'a');
    if (found >= 0) {
        if (all->stage) all->broken = all->current + 1;
        else on_hidden(all, node, found);
    } else if (all->stage == 1 && find(&all->names, node->src[0], 'b') == all->current && node->src[1] == all->last) {
        node->op = 0;
        met(all, node, 2);
    } else if (all->stage == 2 && node->src[0] == all->last) {
        node->op = 0;
        met(all, node, 3);
    } else if (all->stage == 3 && node->src[1] == all->last) {
        on_sum(all, node);
    } else if (all->stage) { /* `hidden` is shared, so the four have to follow each other */
        all->broken = all->current + 1;
    }
    return false;
}

void lowrank_index(names *all) { index_names(all); }
void lowrank_up(tensor *node, int ith, int nth, void *user) { up(node, ith, nth, user); }
void lowrank_down(tensor *node, int ith, int nth, void *user) { down(node, ith, nth, user); }

/* sizeof of the structures, for the caller to compare with its own. */
void lowrank_sizes(int64_t *sizes) {
    sizes[0] = sizeof(tensor), sizes[1] = sizeof(pair), sizes[2] = sizeof(part), sizes[3] = sizeof(run);
    sizes[4] = sizeof(matrix), sizes[5] = sizeof(mixer);
}

/* Computes on one row and on five of every type. A processor that lacks an instruction ends the process here, which is why
 * a process of its own calls this. Not 0: a row came out otherwise among others than alone. */
int lowrank_try(void) {
    enum { IN = 83, OUT = 40, RANK = 3, N = 5 };
    static float x[N * IN], base[N * OUT], alone[N * OUT], among[N * OUT], hidden[N * 2 * RANK];
    static uint32_t a[RANK * IN], b[2 * RANK * TILE];
    static const int types[] = {F16, BF16, F32};
    for (int i = 0; i < N * IN; i++) x[i] = (float)(i * 37 % 101 - 50);
    for (int i = 0; i < N * OUT; i++) base[i] = (float)(i * 7 % 13);
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < RANK * IN; i++) a[i] = types[t] == F32 ? 0x3f000000u + i * 4099u : 0x30003400u + i * 65537u % 512;
        for (int i = 0; i < 2 * RANK * TILE; i++) b[i] = types[t] == F32 ? 0x3e000000u + i * 8209u : 0x31003000u + i * 131u % 512;
        pair pairs[1] = {{a, b, RANK, types[t], 0.25f}};
        part parts[2] = {{pairs, 0.5f, 0}, {pairs, 2.0f, RANK}};
        matrix m = {0};
        mixer all = {0};
        m.mixer = &all, m.n_in = IN, m.n_out = OUT;
        all.matrices = &m, all.parts = parts, all.stride = 2 * RANK, all.hidden = hidden;
        tensor inputs = {0}, result = {0}, node = {0};
        inputs.data = x, result.data = base, node.src[1] = &inputs;
        tensor sum = {0};
        sum.src[0] = &result;
        for (int i = 0; i <= N; i++) {
            run one = {i < N ? i : 0, i < N ? 1 : N, 0, 2};
            all.tables[0].runs = &one, all.tables[0].n_runs = 1;
            sum.data = i < N ? alone : among;
            down(&node, 0, 1, &m);
            up(&sum, 0, 1, &m);
        }
        if (memcmp(alone, among, sizeof alone)) return 1;
    }
    return 0;
}
