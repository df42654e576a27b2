/* The instruction sets that this library is compiled for. A source outside common/ that is not an entry.c is compiled
 * once for each, with KERNEL its name and LANES its floats a vector; an entry.c calls them through a table. */
#ifndef GLADE_ISA_H
#define GLADE_ISA_H

/* the fastest first */
#if defined(__x86_64__)
#define EACH_ISA(M) M(avx512bf16) M(avx512) M(avx2) M(baseline)
#elif defined(__aarch64__)
#define EACH_ISA(M) M(neon)
#else
#define EACH_ISA(M) M(baseline)
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
/* the name of `function` in the build for one instruction set */
#define NAME(function) JOIN(function, KERNEL)

#define EXPORT __attribute__((visibility("default")))

#endif
