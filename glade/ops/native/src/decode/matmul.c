/* The instruction MATMUL: several matrices times one input, with a norm before and an activation behind. */
#include "kernel.h"
#include "matmul.h"

/* bytes of weights in one task: long enough to hide the taking of it, short enough to end together */
#ifndef TASK_BYTES
#define TASK_BYTES 98304
#endif

typedef struct {
    int part;
    long first, end; /* rows */
} Block;

static long rows_per_task(const Matrix *m) {
    long rows = TASK_BYTES / (m->columns * size_of(m->dtype) + 1) / LANES * LANES;
    return rows < LANES ? LANES : rows;
}

static long tasks_of(const Matrix *m) { return (m->rows + rows_per_task(m) - 1) / rows_per_task(m); }

long NAME(matmul_tasks)(const Matmul *op) {
    if (op->activation == SWIGLU) return tasks_of(&op->parts[0].matrix);
    long tasks = 0;
    for (int i = 0; i < op->num_parts; i++) tasks += tasks_of(&op->parts[i].matrix);
    return tasks;
}

static Block block_of(const Matmul *op, long task) {
    int part = 0;
    if (op->activation != SWIGLU)
        for (; task >= tasks_of(&op->parts[part].matrix); part++) task -= tasks_of(&op->parts[part].matrix);
    const Matrix *m = &op->parts[part].matrix;
    long first = task * rows_per_task(m), end = first + rows_per_task(m);
    return (Block){part, first, end < m->rows ? end : m->rows};
}

size_t NAME(matmul_floats)(const Run *run, const Matmul *op) {
    return op->norm.kind == NO_NORM ? 0 : run->num_rows * padded(op->columns);
}

/* where row `row` of the input stands: normed once by each thread that takes tasks of the instruction */
static const float *input_row(const Run *run, const Matmul *op, const Worker *worker, long row) {
    if (op->norm.kind == NO_NORM) return place(run, row, op->input);
    return worker->memory + row * padded(op->columns);
}

static void norm_input(const Run *run, const Instruction *instruction, Worker *worker) {
    const Matmul *op = &instruction->matmul;
    long number = instruction - run->instructions;
    if (op->norm.kind == NO_NORM || worker->normed == number) return;
    worker->normed = number;
    for (long row = 0; row < run->num_rows; row++)
        norm_row(worker->memory + row * padded(op->columns), place(run, row, op->input), op->columns, &op->norm);
}

/* sums -> W x + b of `rows` rows of the matrix, lane r * batch + b */
INLINE vec finished(vec sums, const Matrix *m, long first, int rows, int batch) {
    float scale[LANES], bias[LANES] = {0};
    if (m->dtype == INT8) {
        for (int i = 0; i < LANES; i++) scale[i] = i < rows * batch ? m->scales[first + i / batch] : 0.0f;
        sums *= load(scale);
    }
    if (m->bias.data) {
        for (int i = 0; i < rows * batch; i++) bias[i] = weight_at(m->bias.data, first + i / batch, m->bias.dtype);
        sums += load(bias);
    }
    return sums;
}

INLINE vec activated(vec y, long activation) {
    switch (activation) {
    case GELU: return gelu_vec(y);
    case TANH: return tanh_vec(y);
    case SLIDE: return clamp_vec(y);
    default: return y;
    }
}

INLINE float *output_at(const Run *run, const Matmul *op, int part, long row, long first) {
    if (op->target == LOGITS) return run->logits + row * run->vocab_size + first;
    return place(run, row, op->parts[part].output + first);
}

static void put(const Run *run, const Matmul *op, int part, vec y, long first, int rows, long row, int batch,
                int filled) {
    float out[LANES], before[LANES] = {0};
    if (op->target == ACCUMULATE) {
        for (int i = 0; i < rows * batch; i++)
            if (i % batch < filled) before[i] = *output_at(run, op, part, row + i % batch, first + i / batch);
        y += load(before);
    }
    store(out, activated(y, op->activation));
    for (int b = 0; b < filled; b++) {
        float *to = output_at(run, op, part, row + b, first);
        for (int r = 0; r < rows; r++) to[r] = op->target == ADD ? to[r] + out[r * batch + b] : out[r * batch + b];
    }
}

INLINE vec product(const Matmul *op, int part, long first, const float *const *x, long dtype, int rows, int batch) {
    const Matrix *m = &op->parts[part].matrix;
    const char *weights = m->data + first * m->columns * size_of(dtype);
    return finished(tile_sums(weights, x, m, dtype, rows, batch), m, first, rows, batch);
}

INLINE void tile(const Run *run, const Matmul *op, const Block *block, long first, const float *const *x, long row,
                 int filled, long dtype, int rows, int batch) {
    vec y = product(op, block->part, first, x, dtype, rows, batch);
    if (op->activation == SWIGLU) y = silu_vec(y) * product(op, 1, first, x, dtype, rows, batch);
    put(run, op, block->part, y, first, rows, row, batch, filled);
}

/* a tile's weights are used for all rows of the batch while they are in the nearest cache */
INLINE void block_rows(const Run *run, const Matmul *op, const Block *block, const Worker *worker, long dtype,
                       int batch) {
    const int rows = LANES / batch;
    for (long first = block->first; first < block->end; first += rows) {
        for (long row = 0; row < run->num_rows; row += batch) {
            const float *x[LANES];
            int filled = run->num_rows - row < batch ? (int)(run->num_rows - row) : batch;
            for (int b = 0; b < batch; b++) x[b] = input_row(run, op, worker, row + (b < filled ? b : 0));
            if (first + rows <= block->end) {
                tile(run, op, block, first, x, row, filled, dtype, rows, batch);
                continue;
            }
            for (long r = first; r < block->end; r++) tile(run, op, block, r, x, row, filled, dtype, 1, batch);
        }
    }
}

INLINE void block_batch(const Run *run, const Matmul *op, const Block *block, const Worker *worker, long dtype) {
    long n = run->num_rows;
    if (n == 1) block_rows(run, op, block, worker, dtype, 1);
    else if (n == 2 || LANES == 4) block_rows(run, op, block, worker, dtype, 2);
    else if (n <= 4 || LANES == 8) block_rows(run, op, block, worker, dtype, 4);
    else block_rows(run, op, block, worker, dtype, LANES / 2);
}

void NAME(matmul)(const Run *run, const Instruction *instruction, long task, Worker *worker) {
    const Matmul *op = &instruction->matmul;
    Block block = block_of(op, task);
    norm_input(run, instruction, worker);
    switch (op->parts[block.part].matrix.dtype) {
    case FLOAT32: block_batch(run, op, &block, worker, FLOAT32); break;
    case BFLOAT16: block_batch(run, op, &block, worker, BFLOAT16); break;
    default: block_batch(run, op, &block, worker, INT8);
    }
}
