/* Numbers below 1e-38 become 0 while a kernel runs: a state that decays away would otherwise slow down some processors
 * a hundredfold. */
#ifndef GLADE_UNDERFLOW_H
#define GLADE_UNDERFLOW_H

/* Returns what `restore_underflow` puts back. */
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

#endif
