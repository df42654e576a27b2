/* Which builds there are, and which of them this processor runs. */
#include "isa.h"

#include <stddef.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define NAME_OF(isa) #isa,
static const char *const names[] = {EACH_ISA(NAME_OF)};

enum { NUM_ISAS = sizeof names / sizeof *names };

#if defined(__x86_64__)
enum { AVX512BF16, AVX512, AVX2, BASELINE };

/* asked here and not of the compiler's runtime, which not every compiler brings */
static int runs_here(int index) {
    unsigned a, b, c, d, more, low, high;
    if (index == BASELINE) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    /* which registers the operating system saves: 6 is SSE and AVX, e0 the three parts of AVX-512 */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (index == AVX2) return (low & 6) == 6 && (b & bit_AVX2);
    unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((low & 0xe6) != 0xe6 || (b & wide) != wide) return 0;
    if (index == AVX512) return 1;
    return __get_cpuid_count(7, 1, &more, &b, &c, &d) && (more & 1 << 5);
}
#else
static int runs_here(int index) { return index < NUM_ISAS; }
#endif

/* the name of build `index`, "" if this processor cannot run it, NULL past the last */
EXPORT const char *glade_kernel_name(int index) {
    if (index >= NUM_ISAS) return NULL;
    return runs_here(index) ? names[index] : "";
}
