#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MOST_THREADS = 256 };

typedef struct {
    float *memory;
    size_t floats;
} Memory;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t memory_of_thread;

/* held by the call whose job it is */
static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;

/* guards what follows */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t job_waits = PTHREAD_COND_INITIALIZER, all_left = PTHREAD_COND_INITIALIZER;
static long num_workers, wanted, working;
static struct {
    Task run;
    const void *context;
    long num_tasks, num_shares;
    size_t floats;
    atomic_long arrived;
} job;

/* A share of the tasks is as many neighbours; each has its line of the cache. */
static struct {
    _Alignas(64) atomic_long next;
} shares[MOST_THREADS];

static void free_memory(void *pointer) {
    Memory *m = pointer;
    free(m->memory);
    free(m);
}

/* the threads are not in a forked child: it starts anew */
static void forget_threads(void) {
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&job_waits, NULL);
    pthread_cond_init(&all_left, NULL);
    num_workers = wanted = working = 0;
}

static void set_up(void) {
    if (pthread_key_create(&memory_of_thread, free_memory) || pthread_atfork(NULL, NULL, forget_threads)) abort();
}

static float *memory_for(size_t floats) {
    Memory *m = pthread_getspecific(memory_of_thread);
    if (!m) {
        m = calloc(1, sizeof *m);
        if (!m || pthread_setspecific(memory_of_thread, m)) {
            free(m);
            return NULL;
        }
    }
    if (m->floats < floats || !m->memory) {
        void *fresh;
        if (posix_memalign(&fresh, 64, (floats + 16) * sizeof(float))) return NULL;
        free(m->memory);
        m->memory = fresh;
        m->floats = floats;
    }
    return m->memory;
}

/* A thread takes its own share first, then what is left of the others': neighbours write to the same lines of the cache,
 * and two threads on them would wait for each other's. */
static void take_tasks(float *memory) {
    long own = atomic_fetch_add(&job.arrived, 1);
    for (long i = 0; i < job.num_shares; i++) {
        long share = (own + i) % job.num_shares, end = (share + 1) * job.num_tasks / job.num_shares;
        for (long task; (task = atomic_fetch_add(&shares[share].next, 1)) < end;) job.run(job.context, task, memory);
    }
}

static void *work(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (wanted == 0) pthread_cond_wait(&job_waits, &lock);
        wanted--;
        working++;
        pthread_mutex_unlock(&lock);
        /* a thread without memory leaves the tasks to the others */
        float *memory = memory_for(job.floats);
        if (memory) take_tasks(memory);
        pthread_mutex_lock(&lock);
        if (--working == 0) pthread_cond_signal(&all_left);
    }
    return NULL;
}

/* as many as can be had: with fewer the work only takes longer */
static void start_workers(long num) {
    for (; num_workers < num; num_workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL)) return;
        pthread_detach(thread);
    }
}

int pool_run(Task run, const void *context, long num_tasks, long num_threads, size_t floats) {
    pthread_once(&once, set_up);
    float *memory = memory_for(floats);
    if (!memory) return -1;
    if (num_threads > num_tasks) num_threads = num_tasks;
    if (num_threads > MOST_THREADS) num_threads = MOST_THREADS;
    if (num_threads <= 1 || pthread_mutex_trylock(&in_use)) {
        for (long task = 0; task < num_tasks; task++) run(context, task, memory);
        return 0;
    }
    pthread_mutex_lock(&lock);
    job.run = run, job.context = context, job.num_tasks = num_tasks, job.floats = floats;
    job.num_shares = num_threads;
    atomic_store(&job.arrived, 0);
    for (long i = 0; i < num_threads; i++) atomic_store(&shares[i].next, i * num_tasks / num_threads);
    start_workers(num_threads - 1);
    wanted = num_threads - 1 < num_workers ? num_threads - 1 : num_workers;
    pthread_cond_broadcast(&job_waits);
    pthread_mutex_unlock(&lock);
    take_tasks(memory);
    pthread_mutex_lock(&lock);
    wanted = 0; /* who has not come yet need not */
    while (working) pthread_cond_wait(&all_left, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&in_use);
    return 0;
}
