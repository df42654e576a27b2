/* One run of a decode program on a team of threads.
 *
 * The whole state of the work is one number: which instruction is at work, and its next task. A thread takes a task by
 * adding one to it; who ends the last task of an instruction moves on to the next. Nobody waits for a thread to arrive:
 * one that is late, or that the system has put aside between two tasks, only does less of the work. */
#include "isa.h"
#include "pool.h"
#include "program.h"
#include "underflow.h"

#include <sched.h>
#include <stdatomic.h>

#define DECLARE(isa) extern const DecodeKernel decode_kernel_##isa;
EACH_ISA(DECLARE)

#define ADDRESS(isa) &decode_kernel_##isa,
static const DecodeKernel *const kernels[] = {EACH_ISA(ADDRESS)};

/* looks at the next instruction before a thread lets others have its core: some 50 us */
enum { SPINS = 2000 };

typedef struct {
    const Run *run;
    const DecodeKernel *kernel;
    _Alignas(64) atomic_ullong next; /* instruction << 32 | task */
    _Alignas(64) atomic_long ended;  /* tasks of it */
} Team;

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long instruction_of(unsigned long long next) { return (long)(next >> 32); }

static void await_next(Team *team, long instruction) {
    for (long spins = 0; instruction_of(atomic_load_explicit(&team->next, memory_order_acquire)) == instruction; spins++) {
        if (spins < SPINS) pause_briefly();
        else sched_yield();
    }
}

static void work(const void *context, long unused, float *memory) {
    (void)unused;
    Team *team = (Team *)context;
    const Run *run = team->run;
    Worker worker = {memory, -1};
    unsigned long before = flush_underflow();
    for (long last = -1, tasks = 0;;) {
        unsigned long long taken = atomic_fetch_add(&team->next, 1);
        long number = instruction_of(taken), task = (long)(taken & 0xffffffff);
        if (number >= run->num_instructions) break;
        const Instruction *instruction = &run->instructions[number];
        if (number != last) last = number, tasks = team->kernel->num_tasks(run, instruction);
        if (task >= tasks) {
            await_next(team, number);
            continue;
        }
        team->kernel->run_task(run, instruction, task, &worker);
        if (atomic_fetch_add(&team->ended, 1) + 1 == tasks) {
            atomic_store(&team->ended, 0);
            atomic_store(&team->next, (unsigned long long)(number + 1) << 32);
        }
    }
    restore_underflow(before);
}

static size_t most_floats(const Run *run, const DecodeKernel *kernel) {
    size_t most = 0;
    for (long i = 0; i < run->num_instructions; i++) {
        size_t floats = kernel->floats(run, &run->instructions[i]);
        if (floats > most) most = floats;
    }
    return most;
}

static int check_row(const Run *run, long row) {
    if (run->ids[row] < 0 || run->ids[row] >= run->vocab_size) return BAD_ID;
    long slot = state_row(run, row);
    if (slot < 0 || slot >= run->num_state_rows) return BAD_SLOT;
    for (long other = 0; other < row; other++)
        if (state_row(run, other) == slot) return BAD_SLOT;
    return run->most_positions && run->positions[slot] >= run->most_positions ? BAD_POSITION : 0;
}

/* a state of keys and values that grows has room for one more */
static int check_room(const Run *run, const AttentionHeads *op) {
    const StateTensor *keys = &run->states[op->keys];
    if (op->window) return 0;
    for (long row = 0; row < run->num_rows; row++)
        if ((run->positions[state_row(run, row)] + 1) * op->num_kv_heads * op->key_dim > keys->row) return FULL;
    return 0;
}

static int check(const Run *run) {
    int status = 0;
    for (long row = 0; row < run->num_rows && !status; row++) status = check_row(run, row);
    for (long i = 0; i < run->num_instructions && !status; i++)
        if (run->instructions[i].op == ATTENTION_HEADS) status = check_room(run, &run->instructions[i].attention);
    return status;
}

EXPORT int64_t glade_instruction_bytes(void) { return sizeof(Instruction); }

EXPORT int glade_decode(const Run *run, int kernel) {
    int status = check(run);
    if (status || !run->num_rows) return status;
    Team team = {.run = run, .kernel = kernels[kernel]};
    status = pool_run(work, &team, run->num_threads, run->num_threads, most_floats(run, team.kernel));
    if (status) return status;
    for (long i = 0; i < run->num_lengths; i++)
        for (long row = 0; row < run->num_rows; row++) run->lengths[i][state_row(run, row)]++;
    return 0;
}
