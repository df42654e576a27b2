/* The entry points that Python calls; `kernel` is the index of a build (glade_kernel_name). */
#include <stdlib.h>

#include "kernel.h"
#include "pool.h"
#include "underflow.h"

#define DECLARE_ROWS(function, isa) void function##_##isa(const RowCall *, long, long, float *, float *);
#define DECLARE(isa)                                                       \
    EACH_ROW_FUNCTION(DECLARE_ROWS, isa)                                   \
    size_t conv_floats_##isa(const ConvCall *);                            \
    void conv_##isa(const ConvCall *, const Segment *, float *);           \
    void conv_backward_##isa(const ConvCall *, const Segment *, float *, float *);
EACH_ISA(DECLARE)

#define ROW_FUNCTION(function, isa) function##_##isa,
#define ROW_FUNCTIONS(isa) static const RowFunction rows_##isa[] = {EACH_ROW_FUNCTION(ROW_FUNCTION, isa)};
EACH_ISA(ROW_FUNCTIONS)

#define ROW(isa) {rows_##isa, conv_floats_##isa, conv_##isa, conv_backward_##isa},
static const ElementwiseKernel kernels[] = {EACH_ISA(ROW)};

enum { NO_MEMORY = -1, SEGMENT_TOKENS = 128, MOST_TASKS = 64 };

/* Waking a thread costs some 10 us: below 2^15 elements the caller does the work alone. */
static long threads_for(double elements, long num_threads) { return elements < 32768 ? 1 : num_threads; }

static long at_most(long x, long most) { return x < most ? x : most; }

/* total[i] = the sum of the tasks' share i, in their order */
static void add_up(float *total, const float *shares, long num_tasks, long num) {
    for (long i = 0; i < num; i++) total[i] = 0.0f;
    for (long task = 0; task < num_tasks; task++)
        for (long i = 0; i < num; i++) total[i] += shares[task * num + i];
}

typedef struct {
    const RowCall *call;
    RowFunction function;
    float *shares;
    long num_tasks;
} RowJob;

static void row_task(const void *context, long task, float *memory) {
    const RowJob *job = context;
    unsigned long before = flush_underflow();
    long rows = job->call->num_rows, from = rows * task / job->num_tasks, to = rows * (task + 1) / job->num_tasks;
    job->function(job->call, from, to, job->shares + task * job->call->num_sums * job->call->width,
                  memory);
    restore_underflow(before);
}

/* How the rows are cut into tasks is a function of the shape alone. */
EXPORT int glade_rows(const RowCall *call, int kernel) {
    long num_sums = call->num_sums * call->width;
    RowJob job = {call, kernels[kernel].rows[call->function], NULL, at_most((call->num_rows + 31) / 32, MOST_TASKS)};
    if (num_sums) {
        job.shares = calloc(job.num_tasks * num_sums + 1, sizeof(float));
        if (!job.shares) return NO_MEMORY;
    }
    int status = pool_run(row_task, &job, job.num_tasks,
                          threads_for((double)call->num_rows * call->width, call->num_threads),
                          ROWS_OF_MEMORY * whole(call->width));
    if (num_sums) add_up(call->sums, job.shares, job.num_tasks, num_sums);
    free(job.shares);
    return status;
}

typedef struct {
    const ConvCall *call;
    const ElementwiseKernel *kernel;
    const Segment *segments;
    float *shares; /* [num_tasks, share], of the backward */
    long num_segments, num_tasks, share;
} ConvJob;

static void conv_task(const void *context, long task, float *memory) {
    const ConvJob *job = context;
    unsigned long before = flush_underflow();
    long from = job->num_segments * task / job->num_tasks, to = job->num_segments * (task + 1) / job->num_tasks;
    for (long i = from; i < to; i++) {
        const Segment *segment = job->segments + i;
        if (job->shares) job->kernel->conv_backward(job->call, segment, job->shares + task * job->share, memory);
        else job->kernel->conv(job->call, segment, memory);
    }
    restore_underflow(before);
}

/* Cuts every document into segments (an empty one is one segment); returns how many, and writes them unless NULL. */
static long cut(const ConvCall *c, Segment *segments) {
    long num = 0;
    for (long i = 0; i < c->num_documents; i++) {
        long start = c->borders ? c->borders[i] : i * c->document_tokens;
        long length = (c->borders ? c->borders[i + 1] : start + c->document_tokens) - start, from = 0;
        do {
            long to = at_most(from + SEGMENT_TOKENS, length);
            if (segments) segments[num] = (Segment){i, start, length, from, to};
            num++;
            from = to;
        } while (from < length);
    }
    return num;
}

static int run_conv(ConvJob *job) {
    const ConvCall *c = job->call;
    return pool_run(conv_task, job, job->num_tasks, threads_for((double)c->num_tokens * c->channels, c->num_threads),
                    job->kernel->conv_floats(c));
}

/* dweight and dbias from the sum of the tasks' shares, which takes the place of one more share */
static void write_sums(const ConvCall *c, const ConvJob *job, long row) {
    float *total = job->shares + job->num_tasks * job->share;
    add_up(total, job->shares, job->num_tasks, job->share);
    for (long d = 0; d < c->channels; d++) {
        for (long lag = 0; lag < c->taps; lag++) c->dweight[d * c->taps + c->taps - 1 - lag] = total[lag * row + d];
        c->dbias[d] = total[c->taps * row + d];
    }
}

/* the backward if the call has a dweight */
EXPORT int glade_short_conv(const ConvCall *call, int kernel) {
    long num_segments = cut(call, NULL), row = whole(call->channels);
    ConvJob job = {call, &kernels[kernel], NULL, NULL, num_segments, at_most(num_segments, MOST_TASKS),
                   (call->taps + 1) * row};
    Segment *segments = malloc((num_segments + 1) * sizeof *segments);
    if (call->dweight) job.shares = calloc((job.num_tasks + 1) * job.share, sizeof(float));
    int status = NO_MEMORY;
    if (segments && (job.shares || !call->dweight)) {
        cut(call, segments);
        job.segments = segments;
        status = run_conv(&job);
        if (call->dweight) write_sums(call, &job, row);
    }
    free(segments);
    free(job.shares);
    return status;
}
