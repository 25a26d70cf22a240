/* A stack of adapters in llama.cpp's compute graph, on any of its backends, each row of a batch with its own of them.
 *
 * The LoRA that is set is a stack: the A of several adapters one below the other, their B side by side. Of the four nodes
 * that llama.cpp builds for each matrix (graph.h), the evaluation callback turns the two in the middle into others, before
 * the graph is computed:
 *
 *     hidden = A x;   change = hidden * mask;   scaled = B change;   sum = W x + scaled
 *
 * where a row of `mask` has the scales of that row's adapters, and zeros for the others'. Every backend has these
 * operations, and nothing is read back or waited for while the graph is computed.
 *
 * The product with the mask lies where `hidden` did, and B's where `change` did, which `scaled` took over (ggml-alloc.c:
 * scaling is done in place), so no memory is needed that was not there. llama.cpp may use a graph again, as it was left
 * here: then only the masks are set anew.
 *
 * License: Apache-2.0, as the rest of edgelora.
 */
#include "graph.h"

enum { NONE, HIDDEN, CHANGE, SCALED };

/* A matrix, and its nodes in this graph. */
typedef struct {
    tensor *hidden, *change, *up; /* `up` is B */
    void *home;                   /* where `change` was to lie */
    int32_t layout, stage;        /* which masks are its; its last node that was met */
    int32_t seen, reserved;       /* how often all were */
} place;

typedef struct {
    names names;
    place *places;
    tensor **masks;       /* (n_layouts, tables, n_devices) */
    void *const *devices; /* the first computes in the host's memory */
    int32_t n_devices, n_rows[2]; /* of all tokens, and of those whose logits are wanted: the tables */
    int32_t mul, mul_mat, scale;  /* enum ggml_op */
    int32_t open, broken;         /* matrices whose nodes are being met; one whose are not as expected, plus 1 */
    bool (*is_host)(void *buffer);
    void *(*type_of)(void *buffer);
    void *(*device_of)(void *type);
} stack;

static tensor *mask_for(const stack *all, const place *p, const tensor *hidden) {
    const int64_t rows = hidden->ne[1];
    const int table = rows == all->n_rows[0] ? 0 : 1;
    if (rows != all->n_rows[table] || !hidden->buffer) return NULL;
    int device = 0;
    if (!all->is_host(hidden->buffer)) {
        void *wanted = all->device_of(all->type_of(hidden->buffer));
        for (device = 1; device < all->n_devices && all->devices[device] != wanted; device++) continue;
        if (device == all->n_devices) return NULL;
    }
    return all->masks[(p->layout * 2 + table) * all->n_devices + device];
}

static bool is_plain(const tensor *t) {
    return t->type == F32 && t->ne[2] == 1 && t->ne[3] == 1 && t->nb[0] == 4 && t->nb[1] == (size_t)t->ne[0] * 4;
}

static void on_hidden(stack *all, place *p, tensor *node) {
    if (node->op != all->mul_mat || !is_plain(node)) {
        all->broken = (int)(p - all->places) + 1;
        return;
    }
    p->hidden = node, p->stage = HIDDEN;
    all->open++;
}

/* B hidden becomes hidden * mask; or it is that already. */
static void on_change(stack *all, place *p, tensor *node) {
    tensor *mask = mask_for(all, p, p->hidden);
    if (p->stage != HIDDEN || !mask || memcmp(mask->ne, p->hidden->ne, sizeof mask->ne)) {
        all->broken = (int)(p - all->places) + 1;
        return;
    }
    if (node->op == all->mul_mat) {
        p->up = node->src[0], p->home = node->data;
        node->op = all->mul;
        node->src[0] = p->hidden;
        node->data = p->hidden->data, node->buffer = p->hidden->buffer;
        memcpy(node->ne, p->hidden->ne, sizeof node->ne);
        memcpy(node->nb, p->hidden->nb, sizeof node->nb);
    }
    node->src[1] = mask;
    p->change = node, p->stage = CHANGE;
}

/* scale change becomes B change; or it is that already. */
static void on_scaled(stack *all, place *p, tensor *node) {
    const bool is_new = node->op == all->scale;
    if (p->stage != CHANGE || (is_new && (node->data != p->home || !is_plain(node)))) {
        all->broken = (int)(p - all->places) + 1;
        return;
    }
    if (is_new) {
        node->op = all->mul_mat;
        memset(node->op_params, 0, sizeof node->op_params);
        node->src[0] = p->up, node->src[1] = p->change;
    }
    p->stage = SCALED, p->seen++;
    all->open--;
}

/* llama.cpp's cb_eval, with a stack. It wants no node's values, so the whole graph is computed at once afterwards. */
bool stack_on_node(tensor *node, bool ask, void *user) {
    stack *all = user;
    const tensor *first = node->src[0];
    if (!ask || !all->names.count || all->broken || !first) return !ask;
    int found = find(&all->names, first, 'a');
    if (found >= 0) {
        on_hidden(all, &all->places[found], node);
        return false;
    }
    found = find(&all->names, first, 'b');
    if (found >= 0) {
        place *p = &all->places[found];
        if (node->op != all->mul_mat) all->broken = found + 1;
        else if (node->src[1] == p->hidden) on_change(all, p, node);
        else if (node->src[1] == p->change) on_scaled(all, p, node);
        else all->broken = found + 1;
        return false;
    }
    const tensor *before = first->src[0];
    if (!before) return false;
    found = find(&all->names, before, 'a'); /* of hidden, whose product with a mask this is */
    if (found >= 0) {
        place *p = &all->places[found];
        if (node->op == all->mul && first == p->hidden) on_change(all, p, node);
        else all->broken = found + 1;
        return false;
    }
    if (first->op == all->mul && before->src[0] && (found = find(&all->names, before->src[0], 'a')) >= 0) {
        place *p = &all->places[found];
        if (node->op == all->scale && first == p->change) on_scaled(all, p, node);
        else all->broken = found + 1;
    }
    return false;
}

void stack_index(names *all) { index_names(all); }

/* sizeof of the structures, for the caller to compare with its own. */
void stack_sizes(int64_t *sizes) { sizes[0] = sizeof(tensor), sizes[1] = sizeof(place), sizes[2] = sizeof(stack); }

static bool always(void *buffer) { return buffer != NULL; }

/* Walks the graph of a matrix twice, as llama.cpp would hand it out. 0: its nodes became what they should, and stayed it. */
int stack_try(void) {
    enum { MUL = 1, MUL_MAT = 2, SCALE = 3, ADD = 4, IN = 5, OUT = 7, RANK = 3, ROWS = 2 };
    static float memory[3][ROWS * OUT];
    static char text[NAME_BYTES] = "w";
    int32_t slots[2];
    tensor mask = {.ne = {RANK, ROWS, 1, 1}}, a = {.name = "GPU0#w.lora_a#0"}, b = {.name = "w.lora_b"}, x = {0}, w = {.name = "w"};
    tensor *masks[2] = {&mask, NULL};
    tensor product = {.op = MUL_MAT, .src = {&w, &x}, .data = memory[0]};
    tensor hidden = {.op = MUL_MAT, .src = {&a, &x}, .data = memory[1], .buffer = text, .ne = {RANK, ROWS, 1, 1}, .nb = {4, 4 * RANK}};
    tensor change = {.op = MUL_MAT, .src = {&b, &hidden}, .data = memory[2], .ne = {OUT, ROWS, 1, 1}, .nb = {4, 4 * OUT}};
    tensor scaled = {.op = SCALE, .src = {&change}, .data = memory[2], .op_params = {9}, .ne = {OUT, ROWS, 1, 1}, .nb = {4, 4 * OUT}};
    tensor sum = {.op = ADD, .src = {&product, &scaled}};
    tensor *nodes[] = {&product, &hidden, &change, &scaled, &sum};
    place p = {0};
    stack all = {.names = {text, slots, 1, 2}, .places = &p, .masks = masks, .n_devices = 1, .n_rows = {ROWS, 1}};
    all.mul = MUL, all.mul_mat = MUL_MAT, all.scale = SCALE, all.is_host = always;
    index_names(&all.names);
    for (int pass = 1; pass <= 2; pass++) {
        for (int i = 0; i < 5; i++)
            if (stack_on_node(nodes[i], true, &all)) return 1;
        if (all.broken || all.open || p.seen != pass || hidden.op != MUL_MAT || sum.op != ADD) return 2;
        if (change.op != MUL || change.src[0] != &hidden || change.src[1] != &mask || change.data != memory[1]) return 3;
        if (change.ne[0] != RANK || change.nb[1] != 4 * RANK || scaled.op != MUL_MAT || scaled.op_params[0]) return 4;
        if (scaled.src[0] != &b || scaled.src[1] != &change || scaled.data != memory[2] || scaled.ne[0] != OUT) return 5;
    }
    return 0;
}
