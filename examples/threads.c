/* threads.c - the parallel-for callback on POSIX threads: threads [N]
 *
 * The library starts no thread. A workspace takes a callback; here it is a pool that is created once (pool.h). */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "parallel_demo.h"
#include "pool.h"

int main(int argc, char **argv) {
    pool *threads = pool_create(argc > 1 ? atoi(argv[1]) : 2);
    if (!threads) return 1;
    dsv4_parallel parallel = pool_parallel(threads);
    int status = demo_parallel("a pool of POSIX threads", &parallel);
    pool_destroy(threads);
    return status;
}
