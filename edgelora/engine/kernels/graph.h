/* llama.cpp's compute graph as its evaluation callback meets it: nodes, and which adapted matrix one belongs to.
 *
 * With a LoRA set, llama.cpp builds four nodes for each adapted matrix W (llama-graph.cpp, build_lora_mm):
 *
 *     hidden = A x;   change = B hidden;   scaled = scale change;   sum = W x + scaled
 *
 * where A and B are named as W is, with .lora_a and .lora_b behind it.
 *
 * License: Apache-2.0, as the rest of edgelora.
 */
#ifndef EDGELORA_GRAPH_H
#define EDGELORA_GRAPH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { F32 = 0, F16 = 1, BF16 = 30 }; /* enum ggml_type */
enum { NAME_BYTES = 64 };             /* GGML_MAX_NAME */

/* struct ggml_tensor (ggml.h); `edgelora.engine.graph` proves the layout before any of this runs. */
typedef struct tensor {
    int32_t type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    struct tensor *src[10];
    struct tensor *view_src;
    size_t view_offset;
    void *data;
    char name[NAME_BYTES];
} tensor;

/* The matrices of the base that adapters may change, by name. */
typedef struct {
    const char *text; /* NAME_BYTES each */
    int32_t *slots;   /* a hash of them: indices, or -1 */
    int32_t count, n_slots;
} names;

static uint32_t slot_of(const char *name, size_t length, int32_t n_slots) {
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < length; i++) hash = (hash ^ (uint8_t)name[i]) * 0x100000001b3u;
    return (uint32_t)(hash >> 32) & (uint32_t)(n_slots - 1);
}

/* Fills `slots`, a power of two of them and at least twice as many as names. */
static void index_names(names *all) {
    for (int i = 0; i < all->n_slots; i++) all->slots[i] = -1;
    for (int i = 0; i < all->count; i++) {
        const char *name = all->text + i * NAME_BYTES;
        uint32_t slot = slot_of(name, strlen(name), all->n_slots);
        while (all->slots[slot] >= 0) slot = (slot + 1) & (uint32_t)(all->n_slots - 1);
        all->slots[slot] = i;
    }
}

/* The matrix of which this is the tensor NAME.lora_a, or NAME.lora_b, or the scheduler's copy of it, DEVICE#NAME.lora_a#0;
 * -1 if it is none. */
static int find(const names *all, const tensor *t, char which) {
    static const char mark[] = ".lora_";
    const char *name = t->name, *copied = memchr(name, '#', sizeof t->name);
    size_t length = strnlen(name, sizeof t->name), tail = sizeof mark; /* the mark and one letter */
    if (copied) {
        const char *end = copied + 1;
        while (end < name + length && *end != '#') end++;
        length = (size_t)(end - copied - 1), name = copied + 1;
    }
    if (length <= tail || name[length - 1] != which || memcmp(name + length - tail, mark, tail - 1)) return -1;
    const size_t stem = length - tail;
    uint32_t slot = slot_of(name, stem, all->n_slots);
    for (; all->slots[slot] >= 0; slot = (slot + 1) & (uint32_t)(all->n_slots - 1)) {
        const char *known = all->text + all->slots[slot] * NAME_BYTES;
        if (!memcmp(known, name, stem) && !known[stem]) return all->slots[slot];
    }
    return -1;
}

#endif
