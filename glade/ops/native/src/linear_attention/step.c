/* One token of the recurrence for one state row and value head, in place: the decode step.
 *
 *     r = (e * a)^T S      u = write * v - r      o = (scale * q * a)^T S + (scale * q . k) u      S <- Diag(a) S + k u^T
 *
 * so one pass reads the state for both products and a second, over memory that is then in cache, updates it.
 */
#include "chunk.h"
#include "kernel.h"

typedef struct {
    float *q, *k, *e, *a; /* [K]: scale * q * a, k, erase * k * a, a */
    float *z, *o;         /* [V] */
    float *tail;          /* [K, LANES]: the last columns where V is no multiple of LANES */
    float dot;            /* scale * q . k */
} Token;

static size_t carve(Token *x, float *base, long K, long V) {
    Arena arena = {base, 0};
    float **k_like[] = {&x->q, &x->k, &x->e, &x->a}, **v_like[] = {&x->z, &x->o};
    for (size_t i = 0; i < sizeof k_like / sizeof *k_like; i++) *k_like[i] = take(&arena, padded(K));
    for (size_t i = 0; i < sizeof v_like / sizeof *v_like; i++) *v_like[i] = take(&arena, padded(V));
    x->tail = take(&arena, K * LANES);
    return arena.used;
}

INLINE vec gate_vec(const Array *gate, const char *row, long at, long n) {
    return gate->width == 1 ? splat(element(row, gate->dtype)) : row_vec(gate, row, at, n);
}

static void read_token(Token *x, const Step *s, long row, long head) {
    long K = s->key_dim, V = s->value_dim, shared = head / (s->num_value_heads / s->num_heads);
    const char *q = row_of(&s->q, row, 0, shared), *k = row_of(&s->k, row, 0, shared);
    const char *v = row_of(&s->v, row, 0, head);
    const char *g = s->g.data ? row_of(&s->g, row, 0, head) : NULL;
    const char *erase = s->erase.data ? row_of(&s->erase, row, 0, head) : NULL;
    const char *write = s->write.data ? row_of(&s->write, row, 0, head) : NULL;
    vec dot = splat(0.0f);
    for (long at = 0; at < K; at += LANES) {
        vec key = row_vec(&s->k, k, at, K), query = (float)s->scale * row_vec(&s->q, q, at, K);
        vec a = g ? exp_vec(gate_vec(&s->g, g, at, K)) : splat(1.0f);
        dot += query * key;
        store(x->k + at, key);
        store(x->q + at, query * a);
        store(x->a + at, a);
        if (erase) store(x->e + at, key * gate_vec(&s->erase, erase, at, K) * a);
    }
    float lanes[LANES];
    store(lanes, dot);
    x->dot = 0.0f;
    for (int i = 0; i < LANES; i++) x->dot += lanes[i];
    for (long at = 0; at < V; at += LANES) {
        vec z = row_vec(&s->v, v, at, V);
        if (write) z *= gate_vec(&s->write, write, at, V);
        store(x->z + at, z);
    }
}

/* `vecs` vectors of columns of the state, which are `row` elements from k to k */
INLINE void step_columns(const Token *x, float *S, long row, long K, float *z, float *o, int vecs, int erases) {
    vec r[4], y[4];
    UNROLL for (int c = 0; c < vecs; c++) r[c] = y[c] = splat(0.0f);
    for (long k = 0; k < K; k++) {
        UNROLL for (int c = 0; c < vecs; c++) {
            vec old = load(S + k * row + c * LANES);
            y[c] += x->q[k] * old;
            if (erases) r[c] += x->e[k] * old;
        }
    }
    UNROLL for (int c = 0; c < vecs; c++) {
        r[c] = load(z + c * LANES) - r[c];
        store(o + c * LANES, y[c] + x->dot * r[c]);
    }
    for (long k = 0; k < K; k++)
        UNROLL for (int c = 0; c < vecs; c++) {
            float *p = S + k * row + c * LANES;
            store(p, x->a[k] * load(p) + x->k[k] * r[c]);
        }
}

INLINE void step_state(Token *x, float *S, long K, long V, int erases) {
    long at = 0;
    for (; at + 4 * LANES <= V; at += 4 * LANES) step_columns(x, S + at, V, K, x->z + at, x->o + at, 4, erases);
    for (; at + LANES <= V; at += LANES) step_columns(x, S + at, V, K, x->z + at, x->o + at, 1, erases);
    if (at == V) return;
    size_t bytes = (V - at) * sizeof(float);
    memset(x->tail, 0, K * LANES * sizeof(float));
    for (long k = 0; k < K; k++) memcpy(x->tail + k * LANES, S + k * V + at, bytes);
    step_columns(x, x->tail, LANES, K, x->z + at, x->o + at, 1, erases);
    for (long k = 0; k < K; k++) memcpy(S + k * V + at, x->tail + k * LANES, bytes);
}

size_t NAME(step_floats)(const Step *s) {
    Token x;
    return carve(&x, NULL, s->key_dim, s->value_dim);
}

/* task (row, value head) */
void NAME(step)(const Step *s, long task, float *memory) {
    unsigned long before = flush_underflow();
    Token x;
    long K = s->key_dim, V = s->value_dim;
    carve(&x, memory, K, V);
    long head = task % s->num_value_heads, row = task / s->num_value_heads;
    read_token(&x, s, row, head);
    float *S = s->state + (s->slots ? s->slots[row] : row) * s->state_row + head * K * V;
    if (s->erase.data) step_state(&x, S, K, V, 1);
    else step_state(&x, S, K, V, 0);
    write_row(&s->o, row, 0, head, 0, x.o, V);
    restore_underflow(before);
}
