/* What Python hands to the elementwise kernels: numbers and matrices of tokens by channels, nothing of torch's.
 * `struct` formats in native/rows.py and short_conv/cpu.py mirror these records. */
#ifndef GLADE_ELEMENTWISE_CALL_H
#define GLADE_ELEMENTWISE_CALL_H

#include "array.h"

/* rows of channels that lie next to each other; `row` elements from one to the next. Absent: data is NULL. */
typedef struct {
    char *data;
    int64_t dtype, row;
} Matrix;

enum { NUM_MATRICES = 8 };

/* A function that maps rows to rows, by its place in EACH_ROW_FUNCTION (kernel.h). What each matrix is, and `kind`, is said where the function is defined.
 * `sums` [num_sums, width] fp32 (or NULL): sums over all rows, added up in an order that is a function of the shape. */
typedef struct {
    int64_t function, num_rows, width, heads, kind, num_sums, num_threads;
    double eps;
    Matrix m[NUM_MATRICES];
    float *sums;
} RowCall;

/* The short convolution. x [M, D] are the tokens of all documents end to end: document i is tokens borders[i] ..
 * borders[i + 1], or document_tokens each. weight [D, W], bias [D], state [N, D, W - 1], final like state: fp32. The
 * first `unit_channels` channels are divided by their norm in heads of head_dim. y is the forward's answer; dy, dx,
 * dfinal, dstate, dweight [D, W] and dbias [D] are the backward's. */
typedef struct {
    int64_t num_tokens, channels, taps, num_documents, document_tokens, silu, unit_channels, head_dim, num_threads;
    double eps;
    const int64_t *borders;
    Matrix x, y, dy, dx;
    const float *weight, *bias, *state, *dfinal;
    float *final, *dstate, *dweight, *dbias;
} ConvCall;

/* tokens from .. to of one document, counted from its first, which is `start` among all */
typedef struct {
    int64_t document, start, length, from, to;
} Segment;

#endif
