/* parallel_demo.h - the work of threads.c and openmp.c: one prompt, compressed on one thread and on many. */

#ifndef PARALLEL_DEMO_H
#define PARALLEL_DEMO_H

#include "demo.h"

#include <string.h>

enum { DEMO_TOKENS = 1024, DEMO_ROUNDS = 5 };

/* The best time of several calls, or a negative number; out [DEMO_TOKENS / ratio, head_dim] in bf16. */
static inline double demo_time(const dsv4_compressor *compressor, const dsv4_parallel *parallel, const dsv4_bf16 *x,
                               dsv4_bf16 *out) {
    dsv4_allocator heap = dsv4_heap();
    dsv4_workspace *workspace = NULL;
    dsv4_batch batch = {.x = {x, DSV4_BF16, 0},
                        .tokens = DEMO_TOKENS,
                        .out = {out, DSV4_BF16, 0},
                        .entries = dsv4_entry_count(dsv4_compressor_config(compressor), NULL, DEMO_TOKENS)};
    dsv4_error error = {DSV4_OK, ""};
    dsv4_status status = dsv4_workspace_create(compressor, parallel, &heap, &workspace, &error);
    double best = 1e9;
    for (int i = 0; i < DEMO_ROUNDS && status == DSV4_OK; i++) {
        double start = demo_seconds();
        status = dsv4_compress(compressor, &batch, workspace, &error);
        double took = demo_seconds() - start;
        if (took < best) best = took;
    }
    dsv4_workspace_destroy(workspace);
    if (status != DSV4_OK) fprintf(stderr, "%s\n", error.text);
    return status == DSV4_OK ? best : -1;
}

/* Compares one thread with `parallel`, which `name` describes; the exit status of a program. */
static inline int demo_parallel(const char *name, const dsv4_parallel *parallel) {
    dsv4_config config = dsv4_preset_config(DSV4_V4_FLASH_INDEXER);
    const size_t x_size = sizeof(dsv4_bf16) * DEMO_TOKENS * (size_t)config.hidden_dim;
    const size_t out_size = sizeof(dsv4_bf16) * (size_t)(DEMO_TOKENS / config.ratio * config.head_dim);
    dsv4_compressor *compressor = demo_compressor(&config, 1);
    dsv4_bf16 *x = (dsv4_bf16 *)malloc(x_size), *alone = (dsv4_bf16 *)malloc(out_size);
    dsv4_bf16 *together = (dsv4_bf16 *)malloc(out_size);
    int failed = 1;
    if (compressor && x && alone && together) {
        for (int64_t t = 0; t < DEMO_TOKENS; t++) demo_hidden_state(x + t * config.hidden_dim, config.hidden_dim, 7, t);
        double one = demo_time(compressor, NULL, x, alone), many = demo_time(compressor, parallel, x, together);
        int equal = memcmp(alone, together, out_size) == 0;
        failed = one < 0 || many < 0 || !equal;
        printf("%d tokens, kernels %s: 1 thread %.1f ms; %d thread%s, %s, %.1f ms; entries %s\n", DEMO_TOKENS,
               dsv4_compressor_isa(compressor), 1e3 * one, parallel->threads, parallel->threads == 1 ? "" : "s", name,
               1e3 * many, equal ? "equal bit for bit" : "DIFFER");
    }
    free(x);
    free(alone);
    free(together);
    dsv4_compressor_destroy(compressor);
    return failed;
}

#endif /* PARALLEL_DEMO_H */
