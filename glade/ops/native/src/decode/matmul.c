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

/* whether the input is wanted in bfloat16: all matrices are that, and the processor multiplies pairs of them. One row
 * waits for the memory alone, and widening its weights reads them faster (by a fifth on a Zen 4). */
static int is_paired(const Run *run, const Matmul *op) {
    int paired = HAS_PAIRS && run->num_rows > 1;
    for (int i = 0; i < op->num_parts; i++) paired &= op->parts[i].matrix.dtype == BFLOAT16;
    return paired;
}

/* floats from one prepared row of the input to the next */
static long input_pitch(const Run *run, const Matmul *op) {
    return is_paired(run, op) ? (op->columns + PAIRED - 1) / PAIRED * PAIRED / 2 : padded(op->columns);
}

size_t NAME(matmul_floats)(const Run *run, const Matmul *op) {
    return run->num_rows * input_pitch(run, op) + padded(op->columns) + PAIRED;
}

/* where row `row` of the input stands: prepared once by each thread that takes tasks of the instruction */
static const float *input_row(const Run *run, const Matmul *op, const Worker *worker, long row) {
    if (op->norm.kind == NO_NORM && !is_paired(run, op)) return place(run, row, op->input);
    return worker->memory + row * input_pitch(run, op);
}

/* y [whole lines] = x in bfloat16 */
static void to_pairs(uint16_t *y, const float *x, long n) {
    for (long at = 0; at < n; at += LANES) *(hvec_at *)(y + at) = to_bfloat16(row_at(x, at, n));
    long end = padded(n), whole = (n + PAIRED - 1) / PAIRED * PAIRED;
    memset(y + end, 0, (whole > end ? whole - end : 0) * sizeof *y);
}

static void prepare_input(const Run *run, const Instruction *instruction, Worker *worker) {
    const Matmul *op = &instruction->matmul;
    long number = instruction - run->instructions, pitch = input_pitch(run, op);
    int paired = is_paired(run, op), normed = op->norm.kind != NO_NORM;
    if ((!normed && !paired) || worker->prepared == number) return;
    worker->prepared = number;
    float *room = worker->memory + run->num_rows * pitch;
    for (long row = 0; row < run->num_rows; row++) {
        const float *x = place(run, row, op->input);
        float *y = worker->memory + row * pitch;
        if (normed) norm_row(paired ? room : y, x, op->columns, &op->norm);
        if (paired) to_pairs((uint16_t *)y, normed ? room : x, op->columns);
    }
}

typedef vec (*TileSums)(const char *weights, const char *ahead, const float *const *x, long columns);

#define TILE(dtype, rows, batch)                                                                                   \
    static __attribute__((noinline)) vec sums_##dtype##_##rows##_##batch(const char *w, const char *ahead,         \
                                                                         const float *const *x, long n) {          \
        return tile_sums(w, ahead, x, n, dtype, rows == 1 ? 1 : LANES / batch, batch);                             \
    }
/* `all` rows of a tile, or one */
#define TILES(dtype, batch) TILE(dtype, all, batch) TILE(dtype, 1, batch)
#define EACH_BATCH(M, dtype) M(dtype, 1) M(dtype, 2) M(dtype, 4)
enum { all = 0 };
EACH_BATCH(TILES, FLOAT32)
EACH_BATCH(TILES, BFLOAT16)
EACH_BATCH(TILES, INT8)
EACH_BATCH(TILES, PAIRS)

#define PAIR(dtype, batch) {sums_##dtype##_all_##batch, sums_##dtype##_1_##batch},
static const TileSums tiles[4][3][2] = {
    [FLOAT32] = {EACH_BATCH(PAIR, FLOAT32)},
    [BFLOAT16] = {EACH_BATCH(PAIR, BFLOAT16)},
    [INT8] = {EACH_BATCH(PAIR, INT8)},
    [PAIRS] = {EACH_BATCH(PAIR, PAIRS)},
};

/* where a tile's answers belong */
typedef struct {
    const Run *run;
    const Matmul *op;
    int part, rows, batch, paired; /* of the tile */
    long first, row;       /* its first rows of the matrix and of the batch */
    int filled;            /* of the tile's rows of the batch: the others repeat the first */
    long end;              /* of the task's rows of the matrix */
    const char *next[2];   /* what is read after them, from part 0 and, for SWIGLU, from part 1 */
} Tile;

static const char *row_of_matrix(const Matrix *m, long row) { return m->data + row * m->columns * size_of(m->dtype); }

/* Where the task begins to read that this thread is likely to take next: the threads take turns, so it is as many on as
 * there are of them. NULL if that is not known. */
static const char *next_read(const Run *run, const Instruction *i, long task, int part) {
    task += run->num_threads;
    long tasks = NAME(matmul_tasks)(&i->matmul);
    if (task >= tasks) {
        if (++i == run->instructions + run->num_instructions) return NULL;
        task -= tasks;
    }
    if (i->op == LINEAR_HEADS) return NAME(linear_heads_state)(run, &i->linear, task);
    if (i->op != MATMUL) return NULL;
    tasks = NAME(matmul_tasks)(&i->matmul);
    Block block = block_of(&i->matmul, task < tasks ? task : tasks - 1);
    if (i->matmul.activation == SWIGLU) block.part = part;
    return row_of_matrix(&i->matmul.parts[block.part].matrix, block.first);
}

/* what to ask for while a tile of part `part` is read */
static const char *ahead_of(const Tile *t, int part) {
    const Matrix *m = &t->op->parts[part].matrix;
    long row = t->first + ROWS_AHEAD;
    const char *next = t->next[part == t->part ? 0 : 1];
    return row < t->end || !next ? row_of_matrix(m, row) : next + (row - t->end) * m->columns * size_of(m->dtype);
}

/* W x + b */
static vec product(const Tile *t, int part, const float *const *x) {
    const Matrix *m = &t->op->parts[part].matrix;
    TileSums sums_of_tile = tiles[t->paired ? PAIRS : m->dtype][t->batch / 2][t->rows == 1];
    vec sums = sums_of_tile(row_of_matrix(m, t->first), ahead_of(t, part), x, m->columns);
    float scale[LANES], bias[LANES] = {0};
    if (m->dtype == INT8) {
        for (int i = 0; i < LANES; i++) scale[i] = i < t->rows * t->batch ? m->scales[t->first + i / t->batch] : 0.0f;
        sums *= load(scale);
    }
    if (m->bias.data) {
        for (int i = 0; i < t->rows * t->batch; i++)
            bias[i] = weight_at(m->bias.data, t->first + i / t->batch, m->bias.dtype);
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

static float *output_at(const Tile *t, int b) {
    if (t->op->target == LOGITS) return t->run->logits + (t->row + b) * t->run->vocab_size + t->first;
    return place(t->run, t->row + b, t->op->parts[t->part].output + t->first);
}

static void put(const Tile *t, vec y) {
    float out[LANES], before[LANES] = {0};
    if (t->op->target == ACCUMULATE) {
        for (int i = 0; i < t->rows * t->batch; i++)
            if (i % t->batch < t->filled) before[i] = output_at(t, i % t->batch)[i / t->batch];
        y += load(before);
    }
    store(out, activated(y, t->op->activation));
    for (int b = 0; b < t->filled; b++) {
        float *to = output_at(t, b);
        for (int r = 0; r < t->rows; r++) {
            float answer = out[r * t->batch + b];
            to[r] = t->op->target == ADD ? to[r] + answer : answer;
        }
    }
}

static void tile(const Tile *t, const float *const *x) {
    vec y = product(t, t->part, x);
    if (t->op->activation == SWIGLU) y = silu_vec(y) * product(t, 1, x);
    put(t, y);
}

/* all rows of the batch times some of the matrix, whose weights stay in the nearest cache meanwhile */
static void tiles_of_batch(Tile *t, const Worker *worker) {
    long num_rows = t->run->num_rows;
    for (t->row = 0; t->row < num_rows; t->row += t->batch) {
        const float *x[MOST_BATCH];
        t->filled = num_rows - t->row < t->batch ? (int)(num_rows - t->row) : t->batch;
        for (int b = 0; b < t->batch; b++) x[b] = input_row(t->run, t->op, worker, t->row + (b < t->filled ? b : 0));
        tile(t, x);
    }
}

void NAME(matmul)(const Run *run, const Instruction *instruction, long task, Worker *worker) {
    const Matmul *op = &instruction->matmul;
    Block block = block_of(op, task);
    prepare_input(run, instruction, worker);
    int batch = run->num_rows < 3 ? (int)run->num_rows : MOST_BATCH, rows = LANES / batch;
    Tile t = {.run = run, .op = op, .part = block.part, .rows = rows, .batch = batch, .first = block.first,
              .paired = is_paired(run, op), .end = block.end,
              .next = {next_read(run, instruction, task, 0), next_read(run, instruction, task, 1)}};
    for (; t.first + rows <= block.end; t.first += rows) tiles_of_batch(&t, worker);
    for (t.rows = 1; t.first < block.end; t.first++) tiles_of_batch(&t, worker);
}
