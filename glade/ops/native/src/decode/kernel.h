/* The instructions of one build: how many tasks each has, the working memory of a task, and the task itself. */
#ifndef GLADE_DECODE_KERNEL_H
#define GLADE_DECODE_KERNEL_H

#include "isa.h"
#include "program.h"

long NAME(matmul_tasks)(const Matmul *);
size_t NAME(matmul_floats)(const Run *, const Matmul *);
void NAME(matmul)(const Run *, const Instruction *, long task, Worker *);

size_t NAME(linear_heads_floats)(const LinearHeads *);
/* the part of the recurrent state that a task works on; NULL if there is no such task */
const char *NAME(linear_heads_state)(const Run *, const LinearHeads *, long task);
void NAME(linear_heads)(const Run *, const LinearHeads *, long task, float *memory);

size_t NAME(attention_heads_floats)(const AttentionHeads *);
void NAME(attention_heads)(const Run *, const AttentionHeads *, long task, float *memory);

#endif
