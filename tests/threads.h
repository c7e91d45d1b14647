/* threads.h - parallel-for callbacks of every temper: real threads, one at a time, in reverse, odd ones first. */

#ifndef TESTS_THREADS_H
#define TESTS_THREADS_H

#include <pthread.h>

#include "support.h"

/* ---- POSIX threads, started for each call ------------------------------------------------------------------ */

typedef struct crew {
    int threads;
    int64_t calls; /* parallel-fors run */
} crew;

typedef struct crew_job {
    pthread_mutex_t lock;
    int64_t next, count;
    dsv4_task *task;
    void *argument;
} crew_job;

SUPPORT void *crew_work(void *job_pointer) {
    crew_job *job = job_pointer;
    for (;;) {
        pthread_mutex_lock(&job->lock);
        int64_t index = job->next < job->count ? job->next++ : -1;
        pthread_mutex_unlock(&job->lock);
        if (index < 0) return NULL;
        job->task(job->argument, index);
    }
}

SUPPORT void crew_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    crew *c = context;
    pthread_t threads[16];
    crew_job job = {PTHREAD_MUTEX_INITIALIZER, 0, count, task, argument};
    int started = 0;
    c->calls++;
    while (started < c->threads - 1 && pthread_create(&threads[started], NULL, crew_work, &job) == 0) started++;
    crew_work(&job);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&job.lock);
}

/* ---- On the calling thread, in an order of its own ---------------------------------------------------------- */

SUPPORT void forward_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    ((crew *)context)->calls++;
    for (int64_t i = 0; i < count; i++) task(argument, i);
}

SUPPORT void reverse_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    ((crew *)context)->calls++;
    for (int64_t i = count - 1; i >= 0; i--) task(argument, i);
}

/* Odd tasks first. */
SUPPORT void shuffled_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    ((crew *)context)->calls++;
    for (int64_t i = 1; i < count; i += 2) task(argument, i);
    for (int64_t i = 0; i < count; i += 2) task(argument, i);
}

typedef struct temper {
    const char *name;
    void (*run)(void *context, int64_t count, dsv4_task *task, void *argument);
    int threads;
} temper;

static const temper tempers[] = {
    {"threads_1", crew_run, 1},      {"threads_2", crew_run, 2},       {"threads_3", crew_run, 3},
    {"threads_7", crew_run, 7},      {"one_at_a_time", forward_run, 5}, {"reverse", reverse_run, 4},
    {"odd_first", shuffled_run, 64},
};
enum { TEMPER_COUNT = sizeof tempers / sizeof *tempers };

SUPPORT dsv4_parallel temper_parallel(const temper *t, crew *c) {
    c->threads = t->threads;
    c->calls = 0;
    dsv4_parallel parallel = {t->run, c, t->threads};
    return parallel;
}

#endif /* TESTS_THREADS_H */
