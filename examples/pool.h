/* pool.h - a parallel-for on POSIX threads that are created once.
 *
 *     pool *p = pool_create(4);
 *     dsv4_parallel parallel = pool_parallel(p);
 *     dsv4_workspace_create(compressor, &parallel, &heap, &workspace, NULL);
 *     ...
 *     pool_destroy(p);                                 after the workspace
 *
 * Threads take the next task by an atomic counter, so uneven tasks do not leave one waiting. Between calls a thread
 * looks for work for some microseconds before it sleeps: decoding calls follow each other faster than a sleeper wakes.
 * A thread that wakes late, on a busy machine, is not waited for. Several workspaces may share a pool; their calls then
 * take turns. */

#ifndef POOL_H
#define POOL_H

#include "dsv4_compressor.h"

#include <pthread.h>
#include <stdlib.h>

enum { POOL_THREADS = 1024, POOL_SPINS = 4000 };

typedef struct pool {
    pthread_mutex_t turn; /* held for the length of a run */
    pthread_mutex_t lock; /* of what follows, but for `next` */
    pthread_cond_t begun, ended;
    unsigned round; /* counts runs; also read without the lock, to spin */
    int open;       /* tasks may still be taken */
    int active;     /* workers inside of the run; also read without the lock */
    int stopped;
    int64_t next, count;
    dsv4_task *task;
    void *argument;
    int workers;
    pthread_t worker[POOL_THREADS];
} pool;

static inline void pool__pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static inline void pool__take_tasks(pool *p) {
    for (;;) {
        int64_t index = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
        if (index >= p->count) return;
        p->task(p->argument, index);
    }
}

/* Returns with the lock held and a round that `seen` was not. */
static inline void pool__await(pool *p, unsigned seen) {
    for (int i = 0; i < POOL_SPINS && __atomic_load_n(&p->round, __ATOMIC_RELAXED) == seen; i++) pool__pause();
    pthread_mutex_lock(&p->lock);
    while (p->round == seen) pthread_cond_wait(&p->begun, &p->lock);
}

static inline void *pool__work(void *argument) {
    pool *p = (pool *)argument;
    unsigned seen = 0;
    for (;;) {
        pool__await(p, seen);
        seen = p->round;
        if (p->stopped) break;
        if (p->open) {
            __atomic_add_fetch(&p->active, 1, __ATOMIC_RELAXED);
            pthread_mutex_unlock(&p->lock);
            pool__take_tasks(p);
            pthread_mutex_lock(&p->lock);
            if (__atomic_sub_fetch(&p->active, 1, __ATOMIC_RELAXED) == 0) pthread_cond_signal(&p->ended);
        }
        pthread_mutex_unlock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static inline void pool__begin_round(pool *p) {
    __atomic_store_n(&p->round, p->round + 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&p->begun);
}

/* What dsv4_parallel asks for. */
static inline void pool_run(void *context, int64_t count, dsv4_task *task, void *argument) {
    pool *p = (pool *)context;
    pthread_mutex_lock(&p->turn);
    pthread_mutex_lock(&p->lock);
    p->task = task;
    p->argument = argument;
    p->count = count;
    p->next = 0;
    p->open = 1;
    if (count > 1) pool__begin_round(p);
    pthread_mutex_unlock(&p->lock);

    pool__take_tasks(p);

    for (int i = 0; i < POOL_SPINS && __atomic_load_n(&p->active, __ATOMIC_RELAXED); i++) pool__pause();
    pthread_mutex_lock(&p->lock);
    p->open = 0;
    while (p->active) pthread_cond_wait(&p->ended, &p->lock);
    pthread_mutex_unlock(&p->lock);
    pthread_mutex_unlock(&p->turn);
}

/* `threads` counts the caller's own. Where the system gives fewer, the pool works with those. NULL: no memory. */
static inline pool *pool_create(int threads) {
    pool *p = (pool *)calloc(1, sizeof *p);
    if (!p) return NULL;
    pthread_mutex_init(&p->turn, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->begun, NULL);
    pthread_cond_init(&p->ended, NULL);
    while (p->workers < threads - 1 && p->workers < POOL_THREADS &&
           pthread_create(&p->worker[p->workers], NULL, pool__work, p) == 0) {
        p->workers++;
    }
    return p;
}

static inline dsv4_parallel pool_parallel(pool *p) {
    dsv4_parallel parallel = {0};
    parallel.run = pool_run;
    parallel.context = p;
    parallel.threads = p->workers + 1;
    return parallel;
}

/* NULL is fine. */
static inline void pool_destroy(pool *p) {
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    p->stopped = 1;
    pool__begin_round(p);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->workers; i++) pthread_join(p->worker[i], NULL);
    pthread_cond_destroy(&p->begun);
    pthread_cond_destroy(&p->ended);
    pthread_mutex_destroy(&p->lock);
    pthread_mutex_destroy(&p->turn);
    free(p);
}

#endif /* POOL_H */
