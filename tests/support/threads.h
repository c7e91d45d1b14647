/* threads.h - parallel-for callbacks of every schedule: real threads, one at a time, in reverse, odd ones first. */

#ifndef TESTS_THREADS_H
#define TESTS_THREADS_H

#include <pthread.h>

#include "support.h"

/* ---- POSIX threads, started for each call ------------------------------------------------------------------ */

typedef struct team {
    int threads;
    int64_t calls; /* parallel-fors run */
} team;

typedef struct team_job {
    pthread_mutex_t lock;
    int64_t next, count;
    dsv4_task *task;
    void *argument;
} team_job;

SUPPORT void *team_work(void *job_pointer) {
    team_job *job = job_pointer;
    for (;;) {
        pthread_mutex_lock(&job->lock);
        int64_t index = job->next < job->count ? job->next++ : -1;
        pthread_mutex_unlock(&job->lock);
        if (index < 0) return NULL;
        job->task(job->argument, index);
    }
}

SUPPORT void team_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    team *c = context;
    pthread_t threads[16];
    team_job job = {PTHREAD_MUTEX_INITIALIZER, 0, count, task, argument};
    int started = 0;
    c->calls++;
    while (started < c->threads - 1 && pthread_create(&threads[started], NULL, team_work, &job) == 0) started++;
    team_work(&job);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&job.lock);
}

/* ---- On the calling thread, in an order of its own ---------------------------------------------------------- */

SUPPORT void forward_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    ((team *)context)->calls++;
    for (int64_t i = 0; i < count; i++) task(argument, i);
}

SUPPORT void reverse_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    ((team *)context)->calls++;
    for (int64_t i = count - 1; i >= 0; i--) task(argument, i);
}

/* Odd tasks first. */
SUPPORT void shuffled_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    ((team *)context)->calls++;
    for (int64_t i = 1; i < count; i += 2) task(argument, i);
    for (int64_t i = 0; i < count; i += 2) task(argument, i);
}

typedef struct schedule {
    const char *name;
    void (*run)(void *context, int64_t count, dsv4_task *task, void *argument);
    int threads;
} schedule;

static const schedule schedules[] = {
    {"threads_1", team_run, 1},      {"threads_2", team_run, 2},        {"threads_3", team_run, 3},
    {"threads_7", team_run, 7},      {"one_at_a_time", forward_run, 5}, {"reverse", reverse_run, 4},
    {"odd_first", shuffled_run, 64},
};
enum { SCHEDULE_COUNT = sizeof schedules / sizeof *schedules };

SUPPORT dsv4_parallel schedule_parallel(const schedule *t, team *c) {
    c->threads = t->threads;
    c->calls = 0;
    dsv4_parallel parallel = {t->run, c, t->threads};
    return parallel;
}

#endif /* TESTS_THREADS_H */
