/* What a build for one instruction set offers, and the names of its functions. */
#ifndef GLADE_KERNEL_H
#define GLADE_KERNEL_H

#include "call.h"

/* A task is an index below num_tasks; which thread runs it, and when, changes no bit of the results. */
typedef struct {
    const char *name;
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

/* KERNEL is given by the build: avx512, avx2, neon or baseline */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(function) JOIN(function, KERNEL)

size_t NAME(forward_floats)(const Call *);
size_t NAME(backward_floats)(const Call *);
size_t NAME(step_floats)(const Step *);
void NAME(forward)(const Call *, long task, long parts, float *memory);
void NAME(backward)(const Call *, long task, float *memory);
void NAME(step)(const Step *, long task, float *memory);
long NAME(max_parts)(const Call *);

/* Numbers below 1e-38 become 0 while a kernel runs: a state that decays away would otherwise slow down some processors
 * a hundredfold. Returns what `restore_underflow` puts back. */
static inline unsigned long flush_underflow(void) {
#if defined(__x86_64__)
    unsigned int before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8000);
    return before;
#elif defined(__aarch64__)
    unsigned long before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1ul << 24));
    return before;
#else
    return 0;
#endif
}

static inline void restore_underflow(unsigned long before) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr((unsigned int)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}

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
