/* One chunk of one value head: its rows in fp32, its decays, and the products of its pairs of tokens.
 *
 * Letters as in chunked.py: a = exp g; c_i the product of a up to row i, t_j the product after row j; e = erase * k;
 * E = c * e, Q = c * scale * q, Kt = t * k; P, A the decayed products of q and of e with k. Only products of decays
 * are taken, never a quotient or an exponent of a sum: any g <= 0 is fine, and what underflows is truly gone. */
#ifndef GLADE_CHUNK_H
#define GLADE_CHUNK_H

#include "pairs.h"
#include "rows.h"

/* the decay a kernel is specialised for */
typedef enum { NO_GATE, SCALAR_GATE, VECTOR_GATE } Gate;

enum { BLOCK = 4 };

typedef struct {
    long rows;     /* tokens, at most CHUNK */
    long blocks;   /* of BLOCK rows, the last one padded with zero rows */
    long row;      /* floats from row to row of a [CHUNK, Kp] */
    float *q, *e, *k;      /* [CHUNK, Kp]: scale * q, erase * k, k */
    float *E, *Q, *Kt;     /* [CHUNK, Kp]; for a gate that is no vector these are e, q, k: see c and t */
    float *a;              /* vector gate: [CHUNK, Kp] */
    float *c_rows, *t_rows; /* vector gate: [CHUNK, Kp], what the backward needs of c and t */
    float *erase_rows;     /* vector erase: [CHUNK, Kp] */
    float *total;          /* [Kp]: what the chunk leaves of the state that it finds */
    float *P, *A;          /* [CHUNK, CHUNK], zeros above the diagonal (A: on it too) */
    float *decay;          /* no vector gate: [CHUNK, CHUNK], the decay from token j to token i >= j */
    float c[CHUNK], t[CHUNK];   /* per row; ones for a vector gate, whose E, Q, Kt have them inside */
    float erase[CHUNK];         /* scalar erase */
} Chunk;

typedef struct {
    long K, V, Kp, Vp;
    long k_row, v_row; /* floats from row to row: not a power of two of bytes */
    long group;        /* value heads that share a head of q and k */
    int pairs;         /* products with the state in pairs of bf16 */
} Sizes;

static inline Sizes sizes_of(const Call *c) {
    long Kp = padded(c->key_dim), Vp = padded(c->value_dim);
    int pairs = 0;
#ifdef BFLOAT16_PAIRS
    pairs = c->q.dtype == BFLOAT16; /* as k and v */
#endif
    return (Sizes){c->key_dim, c->value_dim, Kp, Vp, Kp + 16, Vp + 16, c->num_value_heads / c->num_heads, pairs};
}

INLINE Gate gate_of(const Array *g) { return !g->data ? NO_GATE : g->width == 1 ? SCALAR_GATE : VECTOR_GATE; }

/* panels `panel` .. `end` of a state [K, V] without gaps -> [Kp, Vp] in panels with zeros in the padding */
static inline void read_state(float *panels, const float *state, const Sizes *s, long panel, long end) {
    for (long p = panel; p < end; p++) {
        long first = p * PANEL, width = panel_width(s->Vp, p), n = panel_width(s->V, p);
        float *out = panels + first * s->Kp;
        memset(out, 0, s->Kp * width * sizeof(float));
        if (state)
            for (long k = 0; k < s->K; k++) memcpy(out + k * width, state + k * s->V + first, n * sizeof(float));
    }
}

static inline void write_state(float *state, const float *panels, const Sizes *s, long panel, long end) {
    for (long p = panel; p < end; p++) {
        long first = p * PANEL, width = panel_width(s->Vp, p), n = panel_width(s->V, p);
        for (long k = 0; k < s->K; k++)
            memcpy(state + k * s->V + first, panels + first * s->Kp + k * width, n * sizeof(float));
    }
}

/* hands out pieces of one buffer; with a null buffer it only counts */
typedef struct {
    float *base;
    size_t used;
} Arena;

static inline float *take(Arena *arena, size_t floats) {
    size_t at = arena->used;
    arena->used += (floats + 15) & ~(size_t)15;
    return arena->base ? arena->base + at : NULL;
}

static inline float *take_pairs(Arena *arena, const Sizes *s) {
    return s->pairs ? take(arena, pairs_floats(s->Kp > s->Vp ? s->Kp : s->Vp)) : NULL;
}

static inline Chunk take_chunk(Arena *arena, const Sizes *s, Gate gate, int erases) {
    Chunk x = {.row = s->k_row};
    size_t rows = (size_t)CHUNK * s->k_row;
    /* e follows q, and E follows Q: the backward reads both as one */
    x.q = take(arena, rows);
    x.e = erases ? take(arena, rows) : NULL;
    x.k = take(arena, rows);
    x.erase_rows = erases ? take(arena, rows) : NULL;
    x.total = take(arena, s->Kp);
    x.P = take(arena, CHUNK * CHUNK);
    x.A = erases ? take(arena, CHUNK * CHUNK) : NULL;
    x.Q = x.q, x.E = x.e, x.Kt = x.k;
    if (gate != VECTOR_GATE) {
        x.decay = take(arena, CHUNK * CHUNK);
        return x;
    }
    x.Q = take(arena, rows);
    x.E = erases ? take(arena, rows) : NULL;
    x.a = take(arena, rows);
    x.Kt = take(arena, rows);
    x.c_rows = take(arena, rows);
    x.t_rows = take(arena, rows);
    return x;
}

static inline void read_scalars(float *out, const Array *x, long batch, long token, long head, long num) {
    for (long i = 0; i < num; i++) out[i] = element(row_of(x, batch, token + i, head), x->dtype);
}

/* q, k, e and the erase gate of `rows` tokens */
static __attribute__((noinline)) void read_chunk(Chunk *x, const Call *call, const Sizes *s, long batch, long token, long head, long rows,
                       int erases) {
    long n = s->K, row = x->row;
    x->rows = rows, x->blocks = (rows + BLOCK - 1) / BLOCK;
    long rest = x->blocks * BLOCK - rows;
    read_rows(x->q, row, &call->q, batch, token, head / s->group, rows, n, (float)call->scale);
    read_rows(x->k, row, &call->k, batch, token, head / s->group, rows, n, 1.0f);
    zero_rows(x->q + rows * row, row, rest, n);
    zero_rows(x->k + rows * row, row, rest, n);
    if (!erases) return;
    zero_rows(x->e + rows * row, row, rest, n);
    if (call->erase.width == 1) {
        read_scalars(x->erase, &call->erase, batch, token, head, rows);
        for (long i = 0; i < rows; i++)
            for (long at = i * row; at < i * row + n; at += LANES) store(x->e + at, x->erase[i] * load(x->k + at));
        return;
    }
    read_rows(x->erase_rows, row, &call->erase, batch, token, head, rows, n, 1.0f);
    for (long i = 0; i < rows; i++)
        for (long at = i * row; at < i * row + n; at += LANES) store(x->e + at, load(x->erase_rows + at) * load(x->k + at));
}

static const int32_t LANE[CHUNK] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE ivec columns_from(long first) {
    ivec lanes;
    memcpy(&lanes, LANE, sizeof lanes);
    return lanes + (int32_t)first;
}

/* keeps columns j <= i (or j < i) of a [CHUNK, CHUNK], times `factor` if there is one; what lies beyond was never meant
 * and may be nan */
INLINE void keep_lower(float *x, const float *factor, long diagonal) {
    UNROLL for (long i = 0; i < CHUNK; i++)
        UNROLL for (long j = 0; j < CHUNK; j += LANES) {
            float *p = x + i * CHUNK + j;
            ivec inside = columns_from(j) < (int32_t)(i + diagonal);
            vec value = load(p);
            if (factor) value *= load(factor + i * CHUNK + j);
            store(p, select_vec(inside, value, splat(0.0f)));
        }
}

/* no or scalar gate: c, t, total and the table of decays, each by multiplication from row to row */
static __attribute__((noinline)) void scalar_decays(Chunk *x, const Call *call, const Sizes *s, long batch, long token, long head, Gate gate) {
    float a[CHUNK];
    for (long i = 0; i < CHUNK; i++) a[i] = x->c[i] = x->t[i] = 1.0f;
    if (gate != SCALAR_GATE) return;
    float g[CHUNK] = {0};
    read_scalars(g, &call->g, batch, token, head, x->rows);
    for (long i = 0; i < CHUNK; i += LANES) store(a + i, exp_vec(load(g + i)));
    float c = 1.0f;
    vec row[CHUNK / LANES];
    for (long j = 0; j < CHUNK / LANES; j++) row[j] = splat(0.0f);
    for (long i = 0; i < CHUNK; i++) {
        x->c[i] = c *= a[i];
        for (long j = 0; j < CHUNK / LANES; j++) {
            ivec own = columns_from(j * LANES) == (int32_t)i;
            row[j] = select_vec(own, splat(1.0f), row[j] * a[i]);
            store(x->decay + i * CHUNK + j * LANES, row[j]);
        }
    }
    memcpy(x->t, x->decay + (CHUNK - 1) * CHUNK, sizeof x->t);
    for (long at = 0; at < s->Kp; at += LANES) store(x->total + at, splat(c));
}

/* no or scalar gate: plain products of rows, times the table of decays */
static __attribute__((noinline)) void scalar_pairs(Chunk *x, const Sizes *s, Gate gate, int erases) {
    long row = x->row;
    for (long i = 0; i < x->blocks; i++)
        for (long j = 0; j <= i; j++) {
            long at = i * BLOCK * CHUNK + j * BLOCK;
            dots_4x4(x->P + at, CHUNK, x->q + i * BLOCK * row, row, x->k + j * BLOCK * row, row, s->Kp);
            if (erases) dots_4x4(x->A + at, CHUNK, x->e + i * BLOCK * row, row, x->k + j * BLOCK * row, row, s->Kp);
        }
    const float *decay = gate == SCALAR_GATE ? x->decay : NULL;
    keep_lower(x->P, decay, 1);
    if (erases) keep_lower(x->A, decay, 0);
}

/* the pairs of one block with itself: each k is carried forward row by row */
static __attribute__((noinline)) void diagonal_block(Chunk *x, const Sizes *s, long block, int erases) {
    vec acc[16]; /* q.k for i >= j, 10 of them, then e.k for i > j */
    UNROLL for (int i = 0; i < 16; i++) acc[i] = splat(0.0f);
    long row = x->row, base = block * BLOCK * row;
    for (long at = base; at < base + s->Kp; at += LANES) {
        vec w[BLOCK];
        int n = 0, m = 10;
        UNROLL for (int i = 0; i < BLOCK; i++) {
            vec a = load(x->a + at + i * row), q = load(x->q + at + i * row);
            vec e = erases ? load(x->e + at + i * row) : splat(0.0f);
            UNROLL for (int j = 0; j < i; j++) {
                w[j] *= a;
                acc[n++] += q * w[j];
                if (erases) acc[m++] += e * w[j];
            }
            w[i] = load(x->k + at + i * row);
            acc[n++] += q * w[i];
        }
    }
    float sums[16];
    UNROLL for (int i = 0; i < 16; i += LANES) store(sums + i, sums_of(acc + i));
    int n = 0, m = 10;
    for (int i = 0; i < BLOCK; i++) {
        long to = (block * BLOCK + i) * CHUNK + block * BLOCK;
        for (int j = 0; j <= i; j++) x->P[to + j] = sums[n++];
        if (erases)
            for (int j = 0; j < i; j++) x->A[to + j] = sums[m++];
    }
}

/* The decays of one vector of channels: a, then everything that is a row times a product of a's. */
static __attribute__((noinline)) void decay_column(Chunk *x, long at, float *near, float *near_e, float *passed, int erases, int backward) {
    long row = x->row;
    vec c = splat(1.0f);
    for (long block = 0; block < x->blocks; block++) {
        vec p = splat(1.0f), t = splat(1.0f), a[BLOCK];
        UNROLL for (int r = 0; r < BLOCK; r++) {
            long to = (block * BLOCK + r) * row + at;
            a[r] = load(x->a + to);
            p *= a[r];
            vec q = load(x->q + to), here = c * p;
            store(near + to, q * p);
            store(x->Q + to, q * here);
            if (erases) {
                vec e = load(x->e + to);
                store(near_e + to, e * p);
                store(x->E + to, e * here);
            }
            if (backward) store(x->c_rows + to, here);
        }
        UNROLL for (int r = BLOCK - 1; r >= 0; r--) {
            long to = (block * BLOCK + r) * row + at;
            store(x->Kt + to, load(x->k + to) * t);
            if (backward) store(x->t_rows + to, t);
            t *= a[r];
        }
        store(passed + block * row + at, p);
        c *= p;
    }
    store(x->total + at, c);
    if (!backward) return;
    vec after = splat(1.0f);
    for (long block = x->blocks - 1; block >= 0; block--) {
        for (long i = block * BLOCK; i < (block + 1) * BLOCK; i++) {
            float *p = x->t_rows + i * row + at;
            store(p, load(p) * after);
        }
        after *= load(passed + block * row + at);
    }
}

/* Vector gate. A pair within a block carries k; a pair of two blocks meets at the later block's first row: q and e are
 * decayed from there (`near` [2 * CHUNK + CHUNK / BLOCK, Kp]: q, e, the blocks' decays), k to there: in Kt, which moves
 * on block by block until it is at the chunk's end. */
static __attribute__((noinline)) void vector_chunk(Chunk *x, const Call *call, const Sizes *s, long batch, long token, long head, float *near,
                         int erases, int backward) {
    long row = x->row;
    float *near_e = near + CHUNK * row, *passed = near_e + CHUNK * row;
    read_rows(x->a, row, &call->g, batch, token, head, x->rows, s->K, 1.0f);
    for (long i = 0; i < x->rows; i++)
        for (long at = i * row; at < i * row + s->K; at += LANES) store(x->a + at, exp_vec(load(x->a + at)));
    for (long i = x->rows; i < x->blocks * BLOCK; i++)
        for (long at = 0; at < s->K; at += LANES) store(x->a + i * row + at, splat(1.0f));
    for (long at = 0; at < s->Kp; at += LANES) decay_column(x, at, near, near_e, passed, erases, backward);
    memset(x->P, 0, CHUNK * CHUNK * sizeof(float));
    if (erases) memset(x->A, 0, CHUNK * CHUNK * sizeof(float));
    for (long block = 0; block < x->blocks; block++) {
        long base = block * BLOCK;
        diagonal_block(x, s, block, erases);
        for (long j = 0; j < base; j += BLOCK) {
            long to = base * CHUNK + j;
            dots_4x4(x->P + to, CHUNK, near + base * row, row, x->Kt + j * row, row, s->Kp);
            if (erases) dots_4x4(x->A + to, CHUNK, near_e + base * row, row, x->Kt + j * row, row, s->Kp);
        }
        for (long at = 0; at < s->Kp; at += LANES) {
            vec p = load(passed + block * row + at);
            for (long j = 0; j < base; j++) store(x->Kt + j * row + at, load(x->Kt + j * row + at) * p);
        }
    }
}

/* asks for the rows of up to BLOCK tokens, `start` tokens into the sequence */
INLINE void prefetch_inputs(const Call *call, const Sizes *s, const Sequence *seq, long head, long start) {
    long rows = seq->length - start < BLOCK ? seq->length - start : BLOCK, token = seq->first + start;
    const Array *per_head[] = {&call->v, &call->g, &call->erase, &call->write}, *shared[] = {&call->q, &call->k};
    UNROLL for (int i = 0; i < 2; i++) prefetch_rows(shared[i], seq->batch, token, head / s->group, rows, 0);
    UNROLL for (int i = 0; i < 4; i++) prefetch_rows(per_head[i], seq->batch, token, head, rows, 0);
}

/* everything of a chunk that does not depend on the state */
INLINE void prepare_chunk(Chunk *x, const Call *call, const Sizes *s, const Sequence *seq, long head, long start,
                          float *near, Gate gate, int erases, int backward) {
    long token = seq->first + start, rows = seq->length - start < CHUNK ? seq->length - start : CHUNK;
    read_chunk(x, call, s, seq->batch, token, head, rows, erases);
    scalar_decays(x, call, s, seq->batch, token, head, gate);
    if (gate == VECTOR_GATE)
        vector_chunk(x, call, s, seq->batch, token, head, near, erases, backward);
    else
        scalar_pairs(x, s, gate, erases);
}

INLINE size_t near_floats(const Sizes *s) { return (size_t)(2 * CHUNK + CHUNK / BLOCK) * s->k_row; }

#endif
