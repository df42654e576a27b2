/* Forward: one task takes one value head of one sequence (or some of its panels of value channels) through all chunks.
 *
 *     U = (I + A)^-1 (write * v - E S)      o = Q S + P U      S <- Diag(total) S + Kt^T U
 */
#include "kernel.h"
#include "update.h"

enum { ROW = PANEL + 16 };

typedef struct {
    Chunk chunk;
    float *S;             /* [Kp, Vp] in panels */
    float *read_e, *read_q; /* [CHUNK, panel]: what e and q read of the state; e's then becomes U */
    float *near;
    float *pairs; /* working memory of products in pairs of bf16, or NULL */
} Buffers;

static size_t carve(Buffers *b, float *base, const Sizes *s, Gate gate, int erases) {
    Arena arena = {base, 0};
    b->chunk = take_chunk(&arena, s, gate, erases);
    b->S = take(&arena, (size_t)s->Kp * s->Vp);
    b->read_q = take(&arena, CHUNK * ROW);
    b->read_e = take(&arena, CHUNK * ROW);
    b->near = take(&arena, near_floats(s));
    b->pairs = take_pairs(&arena, s);
    return arena.used;
}

/* z - c * read: what the recurrence asks each token to write, before the tokens of its own chunk are heard */
static __attribute__((noinline)) void wanted(float *u, const Chunk *x, const Call *call, const Sequence *seq, long head, long token, long first,
                   long n, int erases) {
    const Array *v = &call->v, *write = &call->write;
    float value_room[ROW], gate_room[ROW];
    for (long i = 0; i < x->rows; i++, u += ROW) {
        const float *value = row_floats(value_room, v, row_of(v, seq->batch, token + i, head), first, n);
        const float *gates = NULL;
        float scalar = 1.0f, c = x->c[i];
        if (write->data) {
            const char *gate = row_of(write, seq->batch, token + i, head);
            if (write->width == 1) scalar = element(gate, write->dtype);
            else gates = row_floats(gate_room, write, gate, first, n);
        }
        for (long at = 0; at < n; at += LANES) {
            vec z = load(value + at) * (gates ? load(gates + at) : splat(scalar));
            if (erases) z -= c * load(u + at);
            store(u + at, z);
        }
    }
    zero_rows(u, ROW, x->blocks * BLOCK - x->rows, n);
}

/* o = c * read + P U, straight into the tensor where its rows are whole vectors of fp32 */
static __attribute__((noinline)) void output(Buffers *b, const Call *call, const Sequence *seq, long head, long token, long first, long n) {
    const Chunk *x = &b->chunk;
    const Array *o = &call->o;
    if (o->dtype == FLOAT32 && n % LANES == 0 && x->rows % BLOCK == 0) {
        float *out = (float *)row_of(o, seq->batch, token, head) + first;
        add_lower(out, o->token, b->read_q, x->c, x->P, b->read_e, ROW, x->blocks, n);
        return;
    }
    add_lower(b->read_q, ROW, b->read_q, x->c, x->P, b->read_e, ROW, x->blocks, padded(n));
    for (long i = 0; i < x->rows; i++) write_row(o, seq->batch, token + i, head, first, b->read_q + i * ROW, n);
}

/* what q and e read of the state S, a panel of `width`; e's rows follow q's, so that both read it at once */
static __attribute__((noinline)) void read_in_pairs(Buffers *b, const Sizes *s, const float *S, long width, int erases) {
    const Chunk *x = &b->chunk;
    long rows = x->blocks * BLOCK;
    int joint = erases && rows == CHUNK;
    multiply(b->pairs, b->read_q, b->read_q, ROW, x->Q, x->row, 1, S, width, joint ? 2 * CHUNK : rows, width, s->K,
             REPLACE, NULL);
    if (erases && !joint)
        multiply(b->pairs, b->read_e, b->read_e, ROW, x->E, x->row, 1, S, width, rows, width, s->K, REPLACE, NULL);
}

/* `ahead`: how far into the sequence the next chunk starts, or -1 */
static __attribute__((noinline)) void panel_forward(Buffers *b, const Call *call, const Sizes *s, const Sequence *seq, long head, long token,
                          long panel, long ahead, Gate gate, int erases) {
    Chunk *x = &b->chunk;
    float *S = b->S + panel * PANEL * s->Kp;
    long width = panel_width(s->Vp, panel), rows = x->blocks * BLOCK;
    long first = panel * PANEL, n = panel_width(s->V, panel);
    for (long i = 0; i < rows; i += BLOCK) {
        if (ahead >= 0) {
            prefetch_inputs(call, s, seq, head, ahead + i);
            prefetch_rows(&call->o, seq->batch, token + i, head, x->rows - i < BLOCK ? x->rows - i : BLOCK, 1);
        }
        if (b->pairs) continue;
        long at = i * x->row, to = i * ROW;
        if (erases) product(b->read_e + to, ROW, x->E + at, x->row, 1, S, width, BLOCK, width, s->K, REPLACE, NULL);
        product(b->read_q + to, ROW, x->Q + at, x->row, 1, S, width, BLOCK, width, s->K, REPLACE, NULL);
    }
    if (b->pairs) read_in_pairs(b, s, S, width, erases);
    wanted(b->read_e, x, call, seq, head, token, first, n, erases);
    if (erases) solve_lower(b->read_e, x->A, ROW, x->blocks, width);
    output(b, call, seq, head, token, first, n);
    if (erases && call->updates)
        for (long i = 0; i < x->rows; i++) {
            long at = ((seq->batch * call->num_tokens + token + i) * call->num_value_heads + head) * s->V + first;
            memcpy(call->updates + at, b->read_e + i * ROW, n * sizeof(float));
        }
    if (gate == SCALAR_GATE)
        for (long i = 0; i < x->rows; i++)
            for (long at = i * ROW; at < i * ROW + width; at += LANES)
                store(b->read_e + at, x->t[i] * load(b->read_e + at));
    multiply(b->pairs, S, S, width, x->Kt, 1, x->row, b->read_e, ROW, s->Kp, width, x->rows,
             gate == NO_GATE ? ADD : SCALE_ROWS, x->total);
}

INLINE void head_forward(Buffers *b, const Call *call, const Sizes *s, const Sequence *seq, long index, long head,
                         long panel, long end, Gate gate, int erases) {
    size_t state = (size_t)s->K * s->V;
    size_t at = (index * call->num_value_heads + head) * state;
    read_state(b->S, call->state ? call->state + at : NULL, s, panel, end);
    for (long start = 0; start < seq->length; start += CHUNK) {
        if (call->states && start % CHECKPOINT == 0) {
            size_t kept = (size_t)(seq->checkpoint + start / CHECKPOINT) * call->num_value_heads + head;
            write_state(call->states + kept * state, b->S, s, panel, end);
        }
        prepare_chunk(&b->chunk, call, s, seq, head, start, b->near, gate, erases, 0);
        for (long p = panel; p < end; p++)
            panel_forward(b, call, s, seq, head, seq->first + start, p, p == panel ? start + CHUNK : -1, gate, erases);
    }
    write_state(call->final + at, b->S, s, panel, end);
}

long NAME(max_parts)(const Call *call) {
    Sizes s = sizes_of(call);
    return num_panels(s.Vp);
}

size_t NAME(forward_floats)(const Call *call) {
    Buffers b;
    Sizes s = sizes_of(call);
    return carve(&b, NULL, &s, gate_of(&call->g), call->erase.data != NULL);
}

/* task (sequence, value head, part), the parts of a head side by side */
void NAME(forward)(const Call *call, long task, long parts, float *memory) {
    unsigned long before = flush_underflow();
    Sizes s = sizes_of(call);
    Gate gate = gate_of(&call->g);
    int erases = call->erase.data != NULL;
    Buffers b;
    carve(&b, memory, &s, gate, erases);
    long part = task % parts, head = task / parts % call->num_value_heads, index = task / parts / call->num_value_heads;
    long panels = num_panels(s.Vp), panel = panels * part / parts, end = panels * (part + 1) / parts;
    Sequence seq = sequence_at(call, index);
    SPECIALISED(head_forward, gate, erases, &b, call, &s, &seq, index, head, panel, end);
    restore_underflow(before);
}
