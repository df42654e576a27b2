/* What a build for one instruction set offers, and the names of its functions. */
#ifndef GLADE_ELEMENTWISE_KERNEL_H
#define GLADE_ELEMENTWISE_KERNEL_H

#include "call.h"
#include "isa.h"

/* floats of a row in working memory: whole vectors of the widest build */
static inline long whole(long n) { return (n + 15) / 16 * 16; }

/* rows from .. to of a call; `sums` [num_sums, width] are this task's share, zeros at first; memory has place for
 * ROWS_OF_MEMORY rows of whole(width) floats */
enum { ROWS_OF_MEMORY = 3 };
typedef void (*RowFunction)(const RowCall *, long from, long to, float *sums, float *memory);

/* the functions of rows, by the numbers in native/rows.py */
#define EACH_ROW_FUNCTION(M, isa)                                                                       \
    M(rms_norm, isa) M(rms_norm_backward, isa) M(swiglu, isa) M(swiglu_backward, isa) M(log_decay, isa) \
        M(log_decay_backward, isa) M(cross_entropy, isa) M(cross_entropy_backward, isa)                 \
        M(add_rms_norm, isa) M(add_rms_norm_backward, isa)

typedef struct {
    const RowFunction *rows;
    size_t (*conv_floats)(const ConvCall *);
    void (*conv)(const ConvCall *, const Segment *, float *memory);
    /* sums [taps + 1, whole(channels)]: this task's share of the gradients of taps and bias */
    void (*conv_backward)(const ConvCall *, const Segment *, float *sums, float *memory);
} ElementwiseKernel;

#endif
