/* Backward: one task takes one value head of one sequence through all chunks, last to first.
 *
 * Between two kept states the chunks are prepared again and their states replayed (transposed, as they are read); the
 * equations are those at the head of chunked.py, with the same letters.
 */
#include "kernel.h"
#include "update.h"

enum { CHUNKS = CHECKPOINT / CHUNK };

typedef struct {
    float *ST[CHUNKS];   /* the state before each chunk, transposed: [Vp, Kp] in panels */
    Chunk chunk[CHUNKS];
    float *U[CHUNKS];    /* [CHUNK, Vp]: what each token wrote */
    float *dS, *dST;     /* [Kp, Vp] and [Vp, Kp] in panels: gradient of the state after the chunk */
    float *dO, *dR;      /* [CHUNK, Vp] */
    float *up_o, *up_r;  /* [CHUNK, Vp] after each other: c * dO (or dO itself) and -c * dR: these meet S and dS */
    float *Ut;           /* [CHUNK, Vp]: t * U */
    float *dP, *dT;      /* [CHUNK, CHUNK] */
    float diagonal[CHUNK];
    float *dQ, *dE, *dK, *dKt; /* [CHUNK, Kp] */
    float *decayed, *carried;  /* [CHUNK, Kp] each: of the gate's gradient */
    float *pairs;        /* working memory of products in pairs of bf16, or NULL */
    float *near, *gate;  /* `gate` [CHUNK, the larger of Kp, Vp]: room for dg, and for rows on their way */
} Buffers;

static size_t carve(Buffers *b, float *base, const Sizes *s, Gate gate, int erases) {
    Arena arena = {base, 0};
    size_t state = (size_t)s->Kp * s->Vp, k_rows = (size_t)CHUNK * s->k_row, v_rows = (size_t)CHUNK * s->v_row;
    for (int i = 0; i < CHUNKS; i++) {
        b->ST[i] = take(&arena, state);
        b->chunk[i] = take_chunk(&arena, s, gate, erases);
        b->U[i] = take(&arena, v_rows);
    }
    float **states[] = {&b->dS, &b->dST}, **v_like[] = {&b->dO, &b->dR, &b->up_o, &b->up_r, &b->Ut};
    float **k_like[] = {&b->dQ, &b->dE, &b->dK, &b->dKt, &b->decayed, &b->carried};
    for (size_t i = 0; i < sizeof states / sizeof *states; i++) *states[i] = take(&arena, state);
    for (size_t i = 0; i < sizeof v_like / sizeof *v_like; i++) *v_like[i] = take(&arena, v_rows);
    for (size_t i = 0; i < sizeof k_like / sizeof *k_like; i++) *k_like[i] = take(&arena, k_rows);
    if (gate != SCALAR_GATE) b->up_o = b->dO, b->up_r = b->dR, b->dR = take(&arena, v_rows);
    b->dP = take(&arena, CHUNK * CHUNK);
    b->dT = take(&arena, CHUNK * CHUNK);
    b->near = take(&arena, near_floats(s));
    b->pairs = take_pairs(&arena, s);
    b->gate = take(&arena, k_rows > v_rows ? k_rows : v_rows);
    return arena.used;
}

/* the kept updates [batch, T, HV, V] as an Array */
INLINE Array updates_of(const Call *call, const Sizes *s) {
    long row = call->num_value_heads * s->V;
    return (Array){(char *)call->updates, FLOAT32, s->V, call->num_tokens * row, row, s->V, 1};
}

/* what a chunk of the backward reads, for up to BLOCK tokens, `start` tokens into the sequence */
INLINE void prefetch_backward(const Call *call, const Sizes *s, const Sequence *seq, long head, long start) {
    if (start < 0 || start >= seq->length) return;
    long rows = seq->length - start < BLOCK ? seq->length - start : BLOCK;
    Array updates = updates_of(call, s);
    prefetch_inputs(call, s, seq, head, start);
    prefetch_rows(&call->d_o, seq->batch, seq->first + start, head, rows, 0);
    prefetch_rows(&updates, seq->batch, seq->first + start, head, rows, 0);
}

/* U of a chunk: kept by the forward, or write * v where nothing is erased */
static __attribute__((noinline)) void read_updates(float *U, const Chunk *x, const Call *call, const Sizes *s, const Sequence *seq, long token,
                         long head, int erases) {
    const Array *write = &call->write;
    if (erases) {
        Array kept = updates_of(call, s);
        read_rows(U, s->v_row, &kept, seq->batch, token, head, x->rows, s->V, 1.0f);
    } else {
        read_rows(U, s->v_row, &call->v, seq->batch, token, head, x->rows, s->V, 1.0f);
        if (write->data)
            for (long i = 0; i < x->rows; i++) {
                const char *gate = row_of(write, seq->batch, token + i, head);
                vec scalar = splat(element(gate, write->dtype));
                for (long at = 0; at < s->V; at += LANES) {
                    vec w = write->width == 1 ? scalar : row_vec(write, gate, at, s->V);
                    store(U + i * s->v_row + at, w * load(U + i * s->v_row + at));
                }
            }
    }
    zero_rows(U + x->rows * s->v_row, s->v_row, x->blocks * BLOCK - x->rows, s->V);
}

/* out = factor_i * in, row by row */
static __attribute__((noinline)) void scale_rows(float *out, const float *in, const float *factor, long rows, long row, long n) {
    for (long i = 0; i < rows; i++)
        for (long at = i * row; at < i * row + n; at += LANES) store(out + at, factor[i] * load(in + at));
}

/* prepares the chunks of tokens start .. start + CHECKPOINT and replays the states before each of them */
static __attribute__((noinline)) long replay(Buffers *b, const Call *call, const Sizes *s, const Sequence *seq, long head, long start, Gate gate,
                   int erases) {
    size_t kept = (size_t)(seq->checkpoint + start / CHECKPOINT) * call->num_value_heads + head;
    long num = (seq->length - start + CHUNK - 1) / CHUNK;
    num = num < CHUNKS ? num : CHUNKS;
    read_state(b->dST, call->states + kept * s->K * s->V, s, 0, num_panels(s->Vp));
    transpose_panels(b->ST[0], b->dST, s->Kp, s->Vp);
    for (long i = 0; i < num; i++) {
        Chunk *x = &b->chunk[i];
        long at = start + i * CHUNK;
        /* later stretches are asked for while the one after them is worked on */
        if (start + CHECKPOINT >= seq->length)
            for (long row = 0; row < CHUNK; row += BLOCK) prefetch_backward(call, s, seq, head, at + CHUNK + row);
        prepare_chunk(x, call, s, seq, head, at, b->near, gate, erases, 1);
        read_updates(b->U[i], x, call, s, seq, seq->first + at, head, erases);
        if (i + 1 == num) break;
        float *U = b->U[i];
        if (gate == SCALAR_GATE) scale_rows(U = b->Ut, b->U[i], x->t, x->rows, s->v_row, s->Vp);
        for (long p = 0; p < num_panels(s->Kp); p++) {
            long width = panel_width(s->Kp, p), first = p * PANEL, from = first * s->Vp;
            multiply(b->pairs, b->ST[i + 1] + from, b->ST[i] + from, width, U, 1, s->v_row, x->Kt + first, x->row, s->Vp,
                     width, x->rows, gate == NO_GATE ? ADD : SCALE_COLUMNS, x->total + first);
        }
    }
    return num;
}

/* dR = (I + A)^-T (P^T dO + Kt dS), and the rows that meet the state */
static __attribute__((noinline)) void updates_backward(Buffers *b, const Chunk *x, const Sizes *s, Gate gate, int erases) {
    long rows = x->blocks * BLOCK, row = s->v_row;
    for (long p = 0; p < num_panels(s->Vp); p++) {
        float *dR = b->dR + p * PANEL;
        const float *dO = b->dO + p * PANEL;
        long width = panel_width(s->Vp, p);
        multiply(b->pairs, dR, dR, row, x->Kt, x->row, 1, b->dS + p * PANEL * s->Kp, width, rows, width, s->K, REPLACE,
                 NULL);
        if (gate == SCALAR_GATE) scale_rows(dR, dR, x->t, rows, row, width);
        solve_upper(dR, x->P, dO, erases ? x->A : NULL, row, x->blocks, width);
    }
    float minus[CHUNK];
    for (long i = 0; i < CHUNK; i++) minus[i] = -x->c[i];
    if (gate == SCALAR_GATE) scale_rows(b->up_o, b->dO, x->c, rows, row, s->Vp);
    if (erases) scale_rows(b->up_r, b->dR, minus, rows, row, s->Vp);
}

/* dQ = up_o S^T, dE = up_r S^T, dKt = U dS^T; meanwhile memory is asked for what comes next. In pairs each product takes
 * all rows at once, but for dE, whose rounding would be felt in the sum that is the gradient of a scalar erase. */
static __attribute__((noinline)) void rows_backward(Buffers *b, const Chunk *x, const Call *call, const Sizes *s,
                                                    const Sequence *seq, long head, long token, const float *ST,
                                                    const float *U, int erases) {
    long rows = x->blocks * BLOCK, step = b->pairs ? rows : BLOCK;
    for (long i = 0; i < rows; i += BLOCK) {
        long left = x->rows - i < BLOCK ? x->rows - i : BLOCK;
        const Array *written[] = {&call->d_q, &call->d_k, &call->d_v};
        prefetch_backward(call, s, seq, head, token - seq->first + i - CHECKPOINT);
        UNROLL for (int n = 0; n < 3; n++) prefetch_rows(written[n], seq->batch, token + i, head, left, 1);
        for (long p = 0; p < num_panels(s->Kp); p++) {
            long width = panel_width(s->Kp, p), at = i * s->k_row + p * PANEL, from = i * s->v_row;
            const float *state = ST + p * PANEL * s->Vp, *d_state = b->dST + p * PANEL * s->Vp;
#define ROWS(room, out, in, matrix, num) \
    multiply(room, out + at, out + at, s->k_row, in + from, s->v_row, 1, matrix, width, num, width, s->V, REPLACE, NULL)
            if (erases) ROWS(NULL, b->dE, b->up_r, state, BLOCK);
            if (i % step) continue;
            ROWS(b->pairs, b->dQ, b->up_o, state, step);
            ROWS(b->pairs, b->dKt, U, d_state, step);
#undef ROWS
        }
    }
}

/* dS <- Diag(total) dS + Q^T dO - E^T dR, the decays of Q and E being in up_o and up_r for a scalar gate; in a full
 * chunk E's rows follow Q's, and up_r's follow up_o's, so that one product does both */
static __attribute__((noinline)) void state_backward(Buffers *b, const Chunk *x, const Sizes *s, Gate gate, int erases) {
    int joint = erases && x->rows == CHUNK;
    for (long p = 0; p < num_panels(s->Vp); p++) {
        float *dS = b->dS + p * PANEL * s->Kp;
        long width = panel_width(s->Vp, p), at = p * PANEL;
        multiply(b->pairs, dS, dS, width, x->Q, 1, x->row, b->up_o + at, s->v_row, s->Kp, width,
                 joint ? 2 * CHUNK : x->rows, gate == NO_GATE ? ADD : SCALE_ROWS, x->total);
        if (erases && !joint)
            multiply(b->pairs, dS, dS, width, x->E, 1, x->row, b->up_r + at, s->v_row, s->Kp, width, x->rows, ADD, NULL);
    }
}

/* dP = tril(dO U^T), its diagonal apart, dT = -tril(dR U^T, -1) */
static __attribute__((noinline)) void pairs_of_gradients(Buffers *b, const Chunk *x, const Sizes *s, const float *U, int erases) {
    long row = s->v_row;
    for (long i = 0; i < x->blocks; i++)
        for (long j = 0; j <= i; j++) {
            long at = i * BLOCK * CHUNK + j * BLOCK;
            dots_4x4(b->dP + at, CHUNK, b->dO + i * BLOCK * row, row, U + j * BLOCK * row, row, s->Vp);
            if (erases) dots_4x4(b->dT + at, CHUNK, b->dR + i * BLOCK * row, row, U + j * BLOCK * row, row, s->Vp);
        }
    for (long i = 0; i < CHUNK; i++) b->diagonal[i] = b->dP[i * CHUNK + i];
    keep_lower(b->dP, NULL, 0);
    if (!erases) return;
    for (long at = 0; at < CHUNK * CHUNK; at += LANES) store(b->dT + at, -load(b->dT + at));
    keep_lower(b->dT, NULL, 0);
}

/* no or scalar gate: what the strictly lower pairs give to q, e (added to what the state gave) and k */
static __attribute__((noinline)) void scalar_pairs_backward(Buffers *b, const Chunk *x, const Sizes *s, Gate gate, int erases) {
    if (gate == SCALAR_GATE)
        for (long at = 0; at < CHUNK * CHUNK; at += LANES) {
            store(b->dP + at, load(b->dP + at) * load(x->decay + at));
            if (erases) store(b->dT + at, load(b->dT + at) * load(x->decay + at));
        }
    long rows = x->blocks * BLOCK, row = s->k_row;
    for (long p = 0; p < num_panels(s->Kp); p++) {
        long width = panel_width(s->Kp, p), at = p * PANEL;
        for (long first = 0; first < rows; first += BLOCK) {
            long from = first * row + at, pairs = first * CHUNK;
            product(b->dQ + from, row, b->dP + pairs, CHUNK, 1, x->k + at, row, BLOCK, width, first + BLOCK, ADD, NULL);
            if (erases)
                product(b->dE + from, row, b->dT + pairs, CHUNK, 1, x->k + at, row, BLOCK, width, first + BLOCK, ADD,
                        NULL);
            pairs += first;
            product(b->dK + from, row, b->dP + pairs, 1, CHUNK, x->q + from, row, BLOCK, width, rows - first, REPLACE,
                    NULL);
            if (erases)
                product(b->dK + from, row, b->dT + pairs, 1, CHUNK, x->e + from, row, BLOCK, width, rows - first, ADD,
                        NULL);
        }
    }
}

/* vector gate: the same for one vector of channels; GROUP tokens, from `first` on, are carried at once: as many as the
 * registers hold. Each k is carried down to every later row, and what a row asks of it back up. */
enum { GROUP = LANES == 16 ? 16 : 8 };

INLINE void carry_group(Buffers *b, const Chunk *x, long at, const int first, int erases) {
    long row = x->row, rows = x->blocks * BLOCK;
    vec w[GROUP];
    UNROLL for (int i = 0; i < CHUNK; i++) {
        if (i < first || i >= rows) continue;
        vec a = load(x->a + i * row + at), dq = load(b->dQ + i * row + at), de = dq;
        if (erases) de = load(b->dE + i * row + at);
        UNROLL for (int j = 0; j < GROUP; j++) {
            if (first + j >= i) continue;
            w[j] *= a;
            dq += b->dP[i * CHUNK + first + j] * w[j];
            if (erases) de += b->dT[i * CHUNK + first + j] * w[j];
        }
        store(b->dQ + i * row + at, dq);
        if (erases) store(b->dE + i * row + at, de);
        if (i < first + GROUP) w[i - first] = load(x->k + i * row + at);
    }
    UNROLL for (int j = 0; j < GROUP; j++) w[j] = splat(0.0f);
    UNROLL for (int i = CHUNK - 1; i >= 0; i--) {
        if (i < first || i >= rows) continue;
        if (i < first + GROUP) store(b->dK + i * row + at, w[i - first]);
        vec a = load(x->a + i * row + at), q = load(x->q + i * row + at), e = q;
        if (erases) e = load(x->e + i * row + at);
        UNROLL for (int j = 0; j < GROUP; j++) {
            if (first + j >= i) continue;
            w[j] += b->dP[i * CHUNK + first + j] * q;
            if (erases) w[j] += b->dT[i * CHUNK + first + j] * e;
            w[j] *= a;
        }
    }
}

static __attribute__((noinline)) void vector_pairs_backward(Buffers *b, const Chunk *x, const Sizes *s, int erases) {
    for (long at = 0; at < x->blocks * BLOCK * s->k_row; at += LANES) {
        store(b->dQ + at, load(b->dQ + at) * load(x->c_rows + at));
        if (erases) store(b->dE + at, load(b->dE + at) * load(x->c_rows + at));
    }
    for (long at = 0; at < s->Kp; at += LANES) {
        carry_group(b, x, at, 0, erases);
        if (GROUP < CHUNK && x->blocks * BLOCK > GROUP) carry_group(b, x, at, GROUP, erases);
    }
}

/* sums over the channels of a [CHUNK, n], one per row */
static __attribute__((noinline)) void row_sums(float *out, const float *in, long row, long rows, long n) {
    for (long first = 0; first < rows; first += LANES) {
        vec acc[LANES];
        UNROLL for (int r = 0; r < LANES; r++) {
            acc[r] = splat(0.0f);
            if (first + r < rows)
                for (long at = (first + r) * row; at < (first + r) * row + n; at += LANES) acc[r] += load(in + at);
        }
        store(out + first, sums_of(acc));
    }
}

/* Per row, from what the strictly lower pairs and the state gave: dq, dk and d_erase are whole and written; the parts of
 * dg are left for gate_backward, for a scalar gate summed over channels but for the last LANES. */
static __attribute__((noinline)) void finish_rows(Buffers *b, const Chunk *x, const Call *call, const Sizes *s, const Sequence *seq, long token,
                        long head, Gate gate, int erases) {
    int vector_erase = call->erase.width > 1;
    float scale = (float)call->scale;
    for (long i = 0; i < x->rows; i++) {
        long from = i * s->k_row;
        float *dq_out = direct_row(&call->d_q, seq->batch, token + i, head, s->K), *to_q = dq_out;
        float *dk_out = direct_row(&call->d_k, seq->batch, token + i, head, s->K), *to_k = dk_out;
        if (!to_q) to_q = b->dQ + from;
        if (!to_k) to_k = b->dK + from;
        float *parts = b->carried + from, *own = b->decayed + from;
        vec diagonal = splat(b->diagonal[i]), t = splat(x->t[i]), erase = splat(erases ? x->erase[i] : 0.0f);
        vec decayed_sum = splat(0.0f), carried_sum = splat(0.0f), erase_sum = splat(0.0f);
        for (long c = 0; c < s->Kp; c += LANES) {
            long at = from + c;
            vec q = load(x->q + at), k = load(x->k + at), dq = load(b->dQ + at), dk = load(b->dK + at);
            vec d_kt = load(b->dKt + at) * (gate == VECTOR_GATE ? load(x->t_rows + at) : t);
            vec decayed = q * dq - k * dk, carried = k * d_kt;
            dk += d_kt + diagonal * q;
            if (erases) {
                vec de = load(b->dE + at), d_erase = k * de;
                decayed += load(x->e + at) * de;
                dk += (vector_erase ? load(x->erase_rows + at) : erase) * de;
                erase_sum += d_erase;
                if (vector_erase) store(b->dE + at, d_erase);
            }
            store(to_q + c, scale * (dq + diagonal * k));
            store(to_k + c, dk);
            if (gate == VECTOR_GATE) {
                store(own + c, decayed);
                store(parts + c, carried);
            }
            decayed_sum += decayed;
            carried_sum += carried;
        }
        if (gate == SCALAR_GATE) {
            store(own, decayed_sum);
            store(parts, carried_sum);
        }
        if (!dq_out) write_row(&call->d_q, seq->batch, token + i, head, 0, to_q, s->K);
        if (!dk_out) write_row(&call->d_k, seq->batch, token + i, head, 0, to_k, s->K);
        if (erases && !vector_erase) store(b->dE + from, erase_sum);
    }
    if (!erases) return;
    float sums[CHUNK + LANES];
    if (!vector_erase) row_sums(sums, b->dE, s->k_row, x->rows, LANES);
    for (long i = 0; i < x->rows; i++)
        write_row(&call->d_erase, seq->batch, token + i, head, 0, vector_erase ? b->dE + i * s->k_row : sums + i,
                  call->erase.width);
}

/* out[k] = sum over v of S[k, v] dS[k, v] for the channels of one panel of the transposed matrices */
INLINE void state_products(float *out, const float *ST, const float *dST, long width, long num) {
#define TILE(at, vecs)                                                                                    \
    vec sum[TILE_VECS];                                                                                   \
    UNROLL for (int c = 0; c < vecs; c++) sum[c] = splat(0.0f);                                           \
    for (long i = at; i < num * width; i += width)                                                        \
        UNROLL for (int c = 0; c < vecs; c++) sum[c] += load(ST + i + c * LANES) * load(dST + i + c * LANES); \
    UNROLL for (int c = 0; c < vecs; c++) store(out + at + c * LANES, sum[c]);
    OVER_COLUMNS(width, TILE)
#undef TILE
}

/* dg_r = sum over i >= r of `decayed` + sum over i < r of `carried` + rowsum(Diag(total) S * dS), see chunked.py */
static __attribute__((noinline)) void gate_backward(Buffers *b, const Chunk *x, const Call *call, const Sizes *s,
                                                    const Sequence *seq, long token, long head, const float *ST,
                                                    Gate gate) {
    float *dg = b->gate, *ends = b->dKt; /* dKt is used up */
    for (long p = 0; p < num_panels(s->Kp); p++) {
        long first = p * PANEL;
        state_products(ends + first, ST + first * s->Vp, b->dST + first * s->Vp, panel_width(s->Kp, p), s->V);
    }
    vec whole = splat(0.0f);
    for (long at = 0; at < s->Kp; at += LANES) {
        vec sum = load(ends + at) * load(x->total + at);
        whole += sum;
        if (gate == SCALAR_GATE) continue;
        for (long i = at; i < at + x->rows * s->k_row; i += s->k_row) {
            store(dg + i, sum);
            sum += load(b->carried + i);
        }
        sum = splat(0.0f);
        for (long i = at + (x->rows - 1) * s->k_row; i >= 0; i -= s->k_row) {
            sum += load(b->decayed + i);
            store(dg + i, load(dg + i) + sum);
        }
    }
    if (gate == VECTOR_GATE) {
        for (long i = 0; i < x->rows; i++) write_row(&call->d_g, seq->batch, token + i, head, 0, dg + i * s->k_row, s->K);
        return;
    }
    float decayed[CHUNK], carried[CHUNK], lanes[LANES];
    row_sums(decayed, b->decayed, s->k_row, x->rows, LANES);
    row_sums(carried, b->carried, s->k_row, x->rows, LANES);
    store(lanes, whole);
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    for (long i = 0; i < x->rows; i++) {
        dg[i] = sum;
        sum += carried[i];
    }
    sum = 0.0f;
    for (long i = x->rows - 1; i >= 0; i--) dg[i] += sum += decayed[i];
    for (long i = 0; i < x->rows; i++) write_row(&call->d_g, seq->batch, token + i, head, 0, dg + i, 1);
}

/* dv = write * dR, d_write = v * dR */
static __attribute__((noinline)) void write_values(Buffers *b, const Chunk *x, const Call *call, const Sizes *s,
                                                   const Sequence *seq, long token, long head) {
    const Array *write = &call->write;
    for (long i = 0; i < x->rows; i++) {
        float *dR = b->dR + i * s->v_row, *room = b->gate, *gate_room = b->gate + s->v_row;
        float *out = direct_row(&call->d_v, seq->batch, token + i, head, s->V), *dv = out ? out : b->up_r + i * s->v_row;
        if (!write->data) {
            write_row(&call->d_v, seq->batch, token + i, head, 0, dR, s->V);
            continue;
        }
        const float *v = row_floats(room, &call->v, row_of(&call->v, seq->batch, token + i, head), 0, s->V);
        const char *gate = row_of(write, seq->batch, token + i, head);
        const float *gates = write->width > 1 ? row_floats(gate_room, write, gate, 0, s->V) : NULL;
        vec scalar = splat(gates ? 0.0f : element(gate, write->dtype)), sum = splat(0.0f);
        for (long at = 0; at < s->V; at += LANES) {
            vec d = load(dR + at), d_write = d * load(v + at);
            store(dv + at, d * (gates ? load(gates + at) : scalar));
            sum += d_write;
            if (gates) store(dR + at, d_write);
        }
        if (!out) write_row(&call->d_v, seq->batch, token + i, head, 0, dv, s->V);
        if (gates) write_row(&call->d_write, seq->batch, token + i, head, 0, dR, s->V);
        else store(dR, sum);
    }
    if (!write->data || write->width > 1) return;
    float sums[CHUNK + LANES];
    row_sums(sums, b->dR, s->v_row, x->rows, LANES);
    for (long i = 0; i < x->rows; i++) write_row(&call->d_write, seq->batch, token + i, head, 0, sums + i, 1);
}

static __attribute__((noinline)) void chunk_backward(Buffers *b, const Call *call, const Sizes *s, const Sequence *seq, long head, long token,
                           long number, Gate gate, int erases) {
    const Chunk *x = &b->chunk[number];
    const float *ST = b->ST[number], *U = b->U[number];
    read_rows(b->dO, s->v_row, &call->d_o, seq->batch, token, head, x->rows, s->V, 1.0f);
    zero_rows(b->dO + x->rows * s->v_row, s->v_row, x->blocks * BLOCK - x->rows, s->V);
    transpose_panels(b->dST, b->dS, s->Kp, s->Vp);
    updates_backward(b, x, s, gate, erases);
    rows_backward(b, x, call, s, seq, head, token, ST, U, erases);
    pairs_of_gradients(b, x, s, U, erases);
    if (gate == VECTOR_GATE) vector_pairs_backward(b, x, s, erases);
    else scalar_pairs_backward(b, x, s, gate, erases);
    finish_rows(b, x, call, s, seq, token, head, gate, erases);
    if (gate != NO_GATE) gate_backward(b, x, call, s, seq, token, head, ST, gate);
    state_backward(b, x, s, gate, erases);
    write_values(b, x, call, s, seq, token, head);
}

INLINE void head_backward(Buffers *b, const Call *call, const Sizes *s, const Sequence *seq, long index, long head,
                          Gate gate, int erases) {
    size_t at = (size_t)(index * call->num_value_heads + head) * s->K * s->V;
    read_state(b->dS, call->d_final ? call->d_final + at : NULL, s, 0, num_panels(s->Vp));
    for (long start = (seq->length - 1) / CHECKPOINT * CHECKPOINT; start >= 0 && seq->length > 0; start -= CHECKPOINT) {
        long num = replay(b, call, s, seq, head, start, gate, erases);
        for (long i = num - 1; i >= 0; i--)
            chunk_backward(b, call, s, seq, head, seq->first + start + i * CHUNK, i, gate, erases);
    }
    if (call->d_state) write_state(call->d_state + at, b->dS, s, 0, num_panels(s->Vp));
}

size_t NAME(backward_floats)(const Call *call) {
    Buffers b;
    Sizes s = sizes_of(call);
    return carve(&b, NULL, &s, gate_of(&call->g), call->erase.data != NULL);
}

/* task (sequence, value head); d_q and d_k are per value head, summed over the group by the caller */
void NAME(backward)(const Call *call, long task, float *memory) {
    unsigned long before = flush_underflow();
    Sizes s = sizes_of(call);
    Gate gate = gate_of(&call->g);
    int erases = call->erase.data != NULL;
    Buffers b;
    carve(&b, memory, &s, gate, erases);
    long head = task % call->num_value_heads, index = task / call->num_value_heads;
    Sequence seq = sequence_at(call, index);
    SPECIALISED(head_backward, gate, erases, &b, call, &s, &seq, index, head);
    restore_underflow(before);
}
