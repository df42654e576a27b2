/* A few threads that sleep between calls. No OpenMP: a process has one runtime of it already, torch's. */
#ifndef GLADE_POOL_H
#define GLADE_POOL_H

#include <stddef.h>

typedef void (*Task)(const void *context, long task, float *memory);

/* Runs tasks 0 .. num_tasks on up to num_threads threads, the caller among them, and returns when all are done. Each
 * thread gets working memory of `floats` floats, aligned to 64 bytes and kept for its next call. Any thread may call;
 * one call at a time has the pool, another that comes meanwhile runs on its own thread. Returns 0, or -1 if there is no
 * memory. */
int pool_run(Task run, const void *context, long num_tasks, long num_threads, size_t floats);

#endif
