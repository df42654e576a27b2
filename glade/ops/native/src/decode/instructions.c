/* The small instructions, and the table of all of them. */
#include "kernel.h"
#include "vectors.h"

static void embed(const Run *run, const Embed *op, long row) {
    const Matrix *t = &op->table;
    long id = run->ids[row], n = t->columns;
    const char *entry = t->data + id * n * size_of(t->dtype);
    float *x = place(run, row, op->output), scale = t->dtype == INT8 ? t->scales[id] : 1.0f;
    for (long i = 0; i < n; i++) x[i] = scale * weight_at(entry, i, t->dtype);
    if (!op->positions.data) return;
    const Matrix *p = &op->positions;
    const char *position = p->data + run->positions[state_row(run, row)] * n * size_of(p->dtype);
    for (long i = 0; i < n; i++) x[i] += weight_at(position, i, p->dtype);
}

static void rotation(const Run *run, const Rotation *op, long row) {
    float *out = place(run, row, op->output), position = (float)run->positions[state_row(run, row)];
    for (long i = 0; i < op->num; i++) {
        float angle = position * op->frequencies[i];
        out[i] = cosf(angle);
        out[op->num + i] = sinf(angle);
    }
}

static void copy(const Run *run, const Copy *op, long row) {
    const StateTensor *state = &run->states[op->state];
    float *kept = (float *)state->data + state_row(run, row) * state->row, *here = place(run, row, op->place);
    memcpy(op->save ? kept : here, op->save ? here : kept, op->width * sizeof(float));
}

static long num_tasks(const Run *run, const Instruction *i) {
    switch (i->op) {
    case MATMUL: return NAME(matmul_tasks)(&i->matmul);
    case LINEAR_HEADS: return run->num_rows * i->linear.num_heads;
    case ATTENTION_HEADS: return run->num_rows * i->attention.num_kv_heads;
    default: return run->num_rows;
    }
}

static size_t floats(const Run *run, const Instruction *i) {
    switch (i->op) {
    case MATMUL: return NAME(matmul_floats)(run, &i->matmul);
    case LINEAR_HEADS: return NAME(linear_heads_floats)(&i->linear);
    case ATTENTION_HEADS: return NAME(attention_heads_floats)(&i->attention);
    default: return 0;
    }
}

static void run_task(const Run *run, const Instruction *i, long task, Worker *worker) {
    switch (i->op) {
    case EMBED: embed(run, &i->embed, task); return;
    case ROTATION: rotation(run, &i->rotation, task); return;
    case MATMUL: NAME(matmul)(run, i, task, worker); return;
    case LINEAR_HEADS: worker->prepared = -1, NAME(linear_heads)(run, &i->linear, task, worker->memory); return;
    case ATTENTION_HEADS: worker->prepared = -1, NAME(attention_heads)(run, &i->attention, task, worker->memory); return;
    case NORMALIZE: {
        float *x = place(run, task, i->normalize.place);
        norm_row(x, x, i->normalize.width, &i->normalize.norm);
        return;
    }
    default: copy(run, &i->copy, task);
    }
}

const DecodeKernel NAME(decode_kernel) = {floats, num_tasks, run_task};
