/* Asks the system to back memory with large pages: weights that are streamed once a token then cost 512 times fewer
 * address look-ups, which on a virtual machine are a third of the time. Advice only: contents and addresses stay. */
#include "isa.h"

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#ifndef MADV_HUGEPAGE
#define MADV_HUGEPAGE 14
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1; older ones refuse it and do it in their own time, or not */
#endif
#endif

enum { HUGE_BYTES = 2 << 20 };

typedef struct {
    int64_t first, end; /* addresses */
} Range;

/* Whole large pages around the range: what else lies there is the same process's memory and loses nothing. */
EXPORT int glade_use_huge_pages(const Range *range, int kernel) {
    (void)kernel;
#if defined(__linux__)
    int64_t first = range->first / HUGE_BYTES * HUGE_BYTES;
    int64_t end = (range->end + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    for (int64_t at = first; at < end; at += HUGE_BYTES)
        if (!madvise((void *)at, HUGE_BYTES, MADV_HUGEPAGE)) madvise((void *)at, HUGE_BYTES, MADV_COLLAPSE);
#else
    (void)range;
#endif
    return 0;
}
