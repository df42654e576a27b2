/* The instruction ATTENTION_HEADS: norms and rotation of q and k, the new place in the state, and softmax attention over
 * it by blocks of tokens with a running maximum, so that the memory does not grow with the text. */
#include "kernel.h"
#include "vectors.h"

enum { BLOCK = 64 };

typedef struct {
    float *q, *k, *scores; /* [group, K], [K], [group, BLOCK] */
    float *sums;           /* [group, V] */
    float *most, *total;   /* [group] */
} Heads;

static size_t carve(Heads *x, float *memory, const AttentionHeads *op) {
    float *start = memory;
    long group = op->num_heads / op->num_kv_heads;
    x->q = cut(&memory, group * padded(op->key_dim));
    x->k = cut(&memory, op->key_dim);
    x->scores = cut(&memory, group * BLOCK);
    x->sums = cut(&memory, group * padded(op->value_dim));
    x->most = cut(&memory, group);
    x->total = cut(&memory, group);
    return memory - start;
}

size_t NAME(attention_heads_floats)(const AttentionHeads *op) {
    Heads x;
    float none[1];
    return carve(&x, none, op);
}

static void write_slot(const StateTensor *state, long at, const float *x, long n) {
    for (long i = 0; i < n; i += LANES) {
        vec y = row_at(x, i, n);
        if (state->dtype == FLOAT32) {
            store_row((float *)state->data + at, i, n, y);
            continue;
        }
        uint16_t half[LANES];
        *(hvec_at *)half = to_bfloat16(y);
        memcpy((uint16_t *)state->data + at + i, half, (n - i < LANES ? n - i : LANES) * sizeof *half);
    }
}

/* a head of q or k as the product sees it, zeros beyond its end */
static void prepare(float *y, const float *x, const Run *run, const AttentionHeads *op, const Norm *norm, long row) {
    memset(y, 0, padded(op->key_dim) * sizeof(float));
    memcpy(y, x, op->key_dim * sizeof(float));
    if (norm->kind != NO_NORM) norm_row(y, y, op->key_dim, norm);
    if (op->rotation >= 0) rotate(y, place(run, row, op->rotation), op->turned);
}

/* scores of `tokens` slots from `slot` on, and the sums scaled to the new maximum */
static void score(Heads *x, const AttentionHeads *op, const Vector *keys, long at, long pitch, long tokens) {
    long group = op->num_heads / op->num_kv_heads, K = op->key_dim, V = padded(op->value_dim);
    for (long h = 0; h < group; h++) {
        float *scores = x->scores + h * BLOCK, most = x->most[h];
        for (long t = 0; t < tokens; t++) {
            vec dot = splat(0.0f);
            long from = at + t * pitch;
            for (long i = 0; i < K; i += LANES) dot += load(x->q + h * padded(K) + i) * vector_at(keys, from + i, from + K);
            scores[t] = (float)op->scale * sum_lanes(dot);
            most = scores[t] > most ? scores[t] : most;
        }
        float shrink = exp_vec(splat(x->most[h] - most))[0];
        x->most[h] = most;
        x->total[h] *= shrink;
        for (long i = 0; i < V; i++) x->sums[h * V + i] *= shrink;
        for (long t = tokens; t % LANES; t++) scores[t] = -INFINITY;
        for (long t = 0; t < tokens; t += LANES) {
            vec p = exp_vec(load(scores + t) - most);
            store(scores + t, p);
            x->total[h] += sum_lanes(p);
        }
    }
}

static void add_values(Heads *x, const AttentionHeads *op, const Vector *values, long at, long pitch, long tokens) {
    long group = op->num_heads / op->num_kv_heads, V = op->value_dim;
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < V; i += LANES) {
            long from = at + t * pitch;
            vec value = vector_at(values, from + i, from + V);
            for (long h = 0; h < group; h++) {
                float *sum = x->sums + h * padded(V) + i;
                store(sum, load(sum) + x->scores[h * BLOCK + t] * value);
            }
        }
}

static void finish(const Heads *x, const Run *run, const AttentionHeads *op, long row, long kv_head) {
    long group = op->num_heads / op->num_kv_heads, V = op->value_dim;
    for (long h = 0; h < group; h++) {
        long first = (kv_head * group + h) * V;
        for (long i = 0; i < V; i += LANES) {
            vec y = load(x->sums + h * padded(V) + i) / x->total[h];
            if (op->gate >= 0) y *= sigmoid_vec(row_at(place(run, row, op->gate + first), i, V));
            store_row(place(run, row, op->output + first), i, V, y);
        }
    }
}

void NAME(attention_heads)(const Run *run, const AttentionHeads *op, long task, float *memory) {
    Heads x;
    carve(&x, memory, op);
    long row = task / op->num_kv_heads, kv_head = task % op->num_kv_heads, group = op->num_heads / op->num_kv_heads;
    const StateTensor *keys = &run->states[op->keys], *values = &run->states[op->values];
    long key_pitch = op->num_kv_heads * op->key_dim, value_pitch = op->num_kv_heads * op->value_dim;
    long position = run->positions[state_row(run, row)], slots = keys->row / key_pitch;
    long slot = op->window ? position % op->window : position;
    long seen = position + 1 < slots ? position + 1 : slots;
    long key = state_row(run, row) * keys->row + kv_head * op->key_dim;
    long value = state_row(run, row) * values->row + kv_head * op->value_dim;
    for (long h = 0; h < group; h++) {
        const float *q = place(run, row, op->q + (kv_head * group + h) * op->key_dim);
        prepare(x.q + h * padded(op->key_dim), q, run, op, &op->q_norm, row);
        x.most[h] = -INFINITY, x.total[h] = 0.0f;
    }
    memset(x.sums, 0, group * padded(op->value_dim) * sizeof(float));
    prepare(x.k, place(run, row, op->k + kv_head * op->key_dim), run, op, &op->k_norm, row);
    write_slot(keys, key + slot * key_pitch, x.k, op->key_dim);
    write_slot(values, value + slot * value_pitch, place(run, row, op->v + kv_head * op->value_dim), op->value_dim);
    Vector k = {keys->data, keys->dtype}, v = {values->data, values->dtype};
    for (long first = 0; first < seen; first += BLOCK) {
        long tokens = seen - first < BLOCK ? seen - first : BLOCK;
        score(&x, op, &k, key + first * key_pitch, key_pitch, tokens);
        add_values(&x, op, &v, value + first * value_pitch, value_pitch, tokens);
    }
    finish(&x, run, op, row, kv_head);
}
