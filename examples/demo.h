/* demo.h - what the examples share: a compressor with seeded weights, hidden states from a seed, a clock. */

#ifndef DEMO_H
#define DEMO_H

#include "dsv4_compressor.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static inline double demo_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* 64 random bits that depend on `index` alone (splitmix64). */
static inline uint64_t demo_bits(uint64_t index) {
    uint64_t z = (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Nearly normal, variance 1: the sum of four uniform numbers. Exact in fp32, so the same on every machine. */
static inline float demo_noise(uint64_t index) {
    uint64_t bits = demo_bits(index);
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) sum += (int32_t)(bits >> 16 * i & 0xFFFF) - 0x8000;
    return (float)(sum / 4) * (7.0f / 0x10000); /* a uniform of width 1.75 four times: variance 1.02 */
}

/* Row `token` of the hidden states that `seed` stands for. */
static inline void demo_hidden_state(dsv4_bf16 *row, int64_t hidden_dim, uint64_t seed, int64_t token) {
    for (int64_t k = 0; k < hidden_dim; k++) {
        row[k] = dsv4_bf16_from_f32(demo_noise(seed << 48 ^ (uint64_t)(token * hidden_dim + k)));
    }
}

/* The parameters of a configuration from a seed, in bf16 but for ape; to be freed with demo_free_params. */
static inline int demo_params(const dsv4_config *config, uint64_t seed, dsv4_params *params) {
    dsv4_param_info info[DSV4_PARAM_COUNT];
    dsv4_const_matrix *const arrays[DSV4_PARAM_COUNT] = {&params->wkv, &params->wgate, &params->ape, &params->norm};
    *params = (dsv4_params){.wkv = {0}};
    if (dsv4_config_params(config, info, NULL) != DSV4_OK) return -1;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (info[i].count == 0) continue;
        dsv4_matrix array = {NULL, i == DSV4_APE ? DSV4_F32 : DSV4_BF16, 0};
        array.data = malloc((size_t)info[i].count * dsv4_dtype_size(array.dtype));
        *arrays[i] = (dsv4_const_matrix){array.data, array.dtype, 0};
        if (!array.data || dsv4_param_init(config, (dsv4_param)i, seed, array, NULL) != DSV4_OK) return -1;
    }
    return 0;
}

static inline void demo_free_params(dsv4_params *params) {
    free((void *)(uintptr_t)params->wkv.data);
    free((void *)(uintptr_t)params->wgate.data);
    free((void *)(uintptr_t)params->ape.data);
    free((void *)(uintptr_t)params->norm.data);
}

/* A compressor with such weights. NULL, and a line on stderr, where there is none. */
static inline dsv4_compressor *demo_compressor(const dsv4_config *config, uint64_t seed) {
    dsv4_allocator heap = dsv4_heap();
    dsv4_compressor *compressor = NULL;
    dsv4_params params = {.wkv = {0}};
    dsv4_error error = {DSV4_ERROR_MEMORY, "out of memory"};
    if (demo_params(config, seed, &params) != 0 ||
        dsv4_compressor_create(config, &params, NULL, &heap, &compressor, &error) != DSV4_OK) {
        fprintf(stderr, "%s\n", error.text);
    }
    demo_free_params(&params);
    return compressor;
}

#endif /* DEMO_H */
