/* openmp.c - the parallel-for callback on OpenMP, which brings its own pool. Without -fopenmp all runs on one thread.
 * Its threads spin while they wait: OMP_WAIT_POLICY=passive spares a machine that others are busy on. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "parallel_demo.h"

static void run(void *context, int64_t count, dsv4_task *task, void *argument) {
    (void)context;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
    for (int64_t i = 0; i < count; i++) task(argument, i);
}

int main(void) {
    int threads = 0;
#ifdef _OPENMP
#pragma omp parallel reduction(+ : threads)
#endif
    threads += 1;
    dsv4_parallel parallel = {.run = run, .threads = threads};
    return demo_parallel("OpenMP", &parallel);
}
