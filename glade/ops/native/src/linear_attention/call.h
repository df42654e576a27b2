/* What Python hands over: one call of linear attention, forward or backward, as plain numbers (packed in glade/ops/linear_attention/cpu/op.py). */
#ifndef GLADE_CALL_H
#define GLADE_CALL_H

#include "array.h"

typedef struct {
    int64_t num_sequences, num_tokens, num_heads, num_value_heads, key_dim, value_dim;
    /* borders of packed documents [num_sequences + 1], or NULL: every sequence is a row of num_tokens tokens */
    const int64_t *borders;
    int64_t num_threads;
    double scale;
    Array q, k, v, g, erase, write;
    /* contiguous fp32 [num_sequences, HV, K, V]; `state` NULL is zeros */
    const float *state;
    float *final;
    Array o;
    /* for a backward: the state before every CHECKPOINT tokens, and what each token writes [batch, T, HV, V]; or NULL */
    float *states;
    float *updates;
    /* backward only */
    Array d_o, d_q, d_k, d_v, d_g, d_erase, d_write;
    const float *d_final; /* NULL is zeros */
    float *d_state;
} Call;

/* One token a row, in place: q, k [B, 1, H, K], v [B, 1, HV, V]; state rows `state_row` elements apart. */
typedef struct {
    int64_t num_rows, num_heads, num_value_heads, key_dim, value_dim, num_threads;
    double scale;
    Array q, k, v, g, erase, write, o;
    float *state;
    int64_t state_row, num_state_rows;
    const int64_t *slots;
} Step;

enum {
    CHUNK = 16,       /* tokens that are worked on together; without matrix units fewer tokens mean less work */
    CHECKPOINT = 64,  /* tokens between the states kept for a backward, a multiple of CHUNK */
};

typedef struct {
    long batch, first, length; /* where a sequence lies in the tensors */
    long checkpoint;           /* the first of its kept states */
} Sequence;

static inline Sequence sequence_at(const Call *c, long index) {
    if (!c->borders) {
        long per_row = (c->num_tokens + CHECKPOINT - 1) / CHECKPOINT;
        return (Sequence){index, 0, c->num_tokens, index * per_row};
    }
    /* floor(border / CHECKPOINT) + index leaves each document room for ceil(length / CHECKPOINT) states */
    long first = c->borders[index];
    return (Sequence){0, first, c->borders[index + 1] - first, first / CHECKPOINT + index};
}

#endif
