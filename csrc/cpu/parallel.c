// Tasks on the caller's threads, and threads for a caller that has none.
#include <pthread.h>
#include <stdatomic.h>

#include "cpu/cpu.h"

typedef struct task_loop {
    void (*task)(void *arg, int64_t index, int32_t worker);
    void *arg;
    int64_t count;
    _Atomic int64_t next;
} task_loop;

static void draw_tasks(void *arg, int32_t worker) {
    task_loop *loop = arg;
    for (;;) {
        const int64_t index = atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed);
        if (index >= loop->count) return;
        loop->task(loop->arg, index, worker);
    }
}

void fa_parallel_for(const fa_workers *workers, int64_t count, void (*task)(void *arg, int64_t index, int32_t worker),
                     void *arg) {
    task_loop loop = {task, arg, count, 0};
    if (count <= 1 || fa_worker_count(workers) == 1) {
        draw_tasks(&loop, 0);
    } else {
        workers->run(workers->context, draw_tasks, &loop);
    }
}

enum { kMaxPosixWorkers = 256 };

typedef struct posix_worker {
    void (*body)(void *arg, int32_t worker);
    void *arg;
    int32_t worker;
} posix_worker;

static void *posix_main(void *arg) {
    const posix_worker *self = arg;
    self->body(self->arg, self->worker);
    return NULL;
}

// context carries the count. A thread that cannot start leaves its share to the others, who draw from the same counter.
static void posix_run(void *context, void (*body)(void *arg, int32_t worker), void *arg) {
    const int32_t count = (int32_t)(intptr_t)context;
    pthread_t threads[kMaxPosixWorkers];
    posix_worker workers[kMaxPosixWorkers];
    int32_t started = 1;
    for (; started < count; ++started) {
        workers[started] = (posix_worker){body, arg, started};
        if (pthread_create(&threads[started], NULL, posix_main, &workers[started]) != 0) break;
    }
    body(arg, 0);
    for (int32_t w = 1; w < started; ++w) pthread_join(threads[w], NULL);
}

fa_workers fa_posix_workers(int32_t count) {
    const int32_t clamped = count < 1 ? 1 : count > kMaxPosixWorkers ? kMaxPosixWorkers : count;
    return (fa_workers){clamped, posix_run, (void *)(intptr_t)clamped};
}
