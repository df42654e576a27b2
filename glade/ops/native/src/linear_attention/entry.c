/* The entry points that Python calls; `kernel` is the index of a build (glade_kernel_name). */
#include "call.h"
#include "kernel.h"
#include "pool.h"

#define DECLARE(isa)                                                   \
    size_t forward_floats_##isa(const Call *);                         \
    size_t backward_floats_##isa(const Call *);                        \
    size_t step_floats_##isa(const Step *);                            \
    void forward_##isa(const Call *, long, long, float *);             \
    void backward_##isa(const Call *, long, float *);                  \
    void step_##isa(const Step *, long, float *);                      \
    long max_parts_##isa(const Call *);
EACH_ISA(DECLARE)

#define ROW(isa)                                                                                     \
    {forward_floats_##isa, backward_floats_##isa, step_floats_##isa, forward_##isa, backward_##isa, \
     step_##isa, max_parts_##isa},
static const Kernel kernels[] = {EACH_ISA(ROW)};

EXPORT int64_t glade_checkpoint(void) { return CHECKPOINT; }

typedef struct {
    const Call *call;
    const Kernel *kernel;
    long parts;
} CallJob;

typedef struct {
    const Step *step;
    const Kernel *kernel;
} StepJob;

static void forward_task(const void *context, long task, float *memory) {
    const CallJob *job = context;
    job->kernel->forward(job->call, task, job->parts, memory);
}

static void backward_task(const void *context, long task, float *memory) {
    const CallJob *job = context;
    job->kernel->backward(job->call, task, memory);
}

static void step_task(const void *context, long task, float *memory) {
    const StepJob *job = context;
    job->kernel->step(job->step, task, memory);
}

/* Waking a thread costs some 10 us; below about 50 us of work (2.5 MFLOP) the caller does it alone. */
static long threads_for(double flops, long num_threads) { return flops < 2.5e6 ? 1 : num_threads; }

static double forward_flops(const Call *c) {
    double tokens = c->borders ? (double)c->num_tokens : (double)c->num_sequences * c->num_tokens;
    return 12.0 * tokens * c->num_value_heads * c->key_dim * c->value_dim;
}

EXPORT int glade_forward(const Call *call, int kernel) {
    CallJob job = {call, &kernels[kernel], 1};
    long heads = call->num_sequences * call->num_value_heads;
    long threads = threads_for(forward_flops(call), call->num_threads);
    if (heads && heads < threads) {
        long parts = (threads + heads - 1) / heads, most = job.kernel->max_parts(call);
        job.parts = parts < most ? parts : most;
    }
    return pool_run(forward_task, &job, heads * job.parts, threads, job.kernel->forward_floats(call));
}

EXPORT int glade_backward(const Call *call, int kernel) {
    CallJob job = {call, &kernels[kernel], 1};
    long threads = threads_for(2 * forward_flops(call), call->num_threads);
    return pool_run(backward_task, &job, call->num_sequences * call->num_value_heads, threads,
                    job.kernel->backward_floats(call));
}

/* -2: a slot is no row of the state */
EXPORT int glade_step(const Step *step, int kernel) {
    if (step->slots)
        for (long row = 0; row < step->num_rows; row++)
            if (step->slots[row] < 0 || step->slots[row] >= step->num_state_rows) return -2;
    StepJob job = {step, &kernels[kernel]};
    long tasks = step->num_rows * step->num_value_heads;
    long threads = threads_for(6.0 * tasks * step->key_dim * step->value_dim, step->num_threads);
    return pool_run(step_task, &job, tasks, threads, job.kernel->step_floats(step));
}
