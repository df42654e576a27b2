/* What a build for one instruction set offers, and the names of its functions. */
#ifndef GLADE_KERNEL_H
#define GLADE_KERNEL_H

#include "call.h"
#include "isa.h"
#include "underflow.h"

/* A task is an index below num_tasks; which thread runs it, and when, changes no bit of the results. */
typedef struct {
    /* floats of working memory that one thread needs */
    size_t (*forward_floats)(const Call *);
    size_t (*backward_floats)(const Call *);
    size_t (*step_floats)(const Step *);
    /* value channels of a forward task are split in `parts` where there are fewer heads than threads */
    void (*forward)(const Call *, long task, long parts, float *memory);
    void (*backward)(const Call *, long task, float *memory);
    void (*step)(const Step *, long task, float *memory);
    long (*max_parts)(const Call *);
} Kernel;

size_t NAME(forward_floats)(const Call *);
size_t NAME(backward_floats)(const Call *);
size_t NAME(step_floats)(const Step *);
void NAME(forward)(const Call *, long task, long parts, float *memory);
void NAME(backward)(const Call *, long task, float *memory);
void NAME(step)(const Step *, long task, float *memory);
long NAME(max_parts)(const Call *);

/* calls f(..., gate, erases) with both as constants, so that each corner is compiled by itself */
#define SPECIALISED(f, gate, erases, ...)                              \
    do {                                                               \
        if (erases) {                                                  \
            if ((gate) == NO_GATE) f(__VA_ARGS__, NO_GATE, 1);         \
            else if ((gate) == SCALAR_GATE) f(__VA_ARGS__, SCALAR_GATE, 1); \
            else f(__VA_ARGS__, VECTOR_GATE, 1);                       \
        } else {                                                       \
            if ((gate) == NO_GATE) f(__VA_ARGS__, NO_GATE, 0);         \
            else if ((gate) == SCALAR_GATE) f(__VA_ARGS__, SCALAR_GATE, 0); \
            else f(__VA_ARGS__, VECTOR_GATE, 0);                       \
        }                                                              \
    } while (0)

#endif
