/* bench_cases.h - what is measured: the list of cases, and the work of each, ready to run again and again. */

#ifndef BENCH_CASES_H
#define BENCH_CASES_H

#include <stdlib.h>

typedef enum bench_kind {
    BENCH_PREFILL,  /* one sequence of `count` tokens, everything from x to entries */
    BENCH_BACKWARD, /* its gradients, all of them; the forward pass kept the projections */
    BENCH_DECODE,   /* `count` sequences, one token each, through layer after layer: weights come from memory */
    BENCH_POOL,     /* entries from projections given as kv and gate, which come from memory */
    BENCH_UNPACK    /* `count` packed rows from memory to numbers there */
} bench_kind;

typedef struct bench_case {
    const char *name;
    dsv4_preset preset;
    dsv4_dtype dtype; /* of x, weights and entries */
    dsv4_sums sums;
    bench_kind kind;
    int64_t count;
    int cold;       /* limited by reading memory, not by multiplying */
    int more;       /* --full also measures it on twice the threads, and a prefill with the other kernel sets */
    dsv4_rows rows; /* entries are packed so, or plain */
} bench_case;

/* One line a case; preset, types and order of sums are what most cases differ in. */
#define BENCH_CASE(NAME, PRESET, TYPE, SUMS, KIND, COUNT, COLD, MORE, ROWS) \
    { NAME, DSV4_V4_##PRESET, DSV4_##TYPE, DSV4_SUMS_##SUMS, BENCH_##KIND, COUNT, COLD, MORE, DSV4_ROWS_##ROWS }
#define BENCH_BOTH(NAME, PRESET, TYPE, SUMS, MORE)                                  \
    BENCH_CASE(NAME "-prefill", PRESET, TYPE, SUMS, PREFILL, 2048, 0, MORE, PLAIN), \
        BENCH_CASE(NAME "-backward", PRESET, TYPE, SUMS, BACKWARD, 2048, 0, MORE, PLAIN)
#define BENCH_ALL_TYPES(NAME, PRESET, MORE)                                                                    \
    BENCH_BOTH(NAME "-bf16", PRESET, BF16, PAIRS, MORE), BENCH_BOTH(NAME "-tiles", PRESET, BF16, TILES, MORE), \
        BENCH_BOTH(NAME "-f32", PRESET, F32, PAIRS, MORE)
#define BENCH_DECODES(NAME, SUMS)                                                    \
    BENCH_CASE(NAME "-decode-1", FLASH_CSA, BF16, SUMS, DECODE, 1, 1, 1, PLAIN),     \
        BENCH_CASE(NAME "-decode-8", FLASH_CSA, BF16, SUMS, DECODE, 8, 1, 0, PLAIN), \
        BENCH_CASE(NAME "-decode-32", FLASH_CSA, BF16, SUMS, DECODE, 32, 0, 0, PLAIN)

/* clang-format off */
static const bench_case bench_cases[] = {
    BENCH_ALL_TYPES("csa-flash",     FLASH_CSA,     1),
    BENCH_ALL_TYPES("hca-flash",     FLASH_HCA,     0),
    BENCH_ALL_TYPES("indexer-flash", FLASH_INDEXER, 0),
    BENCH_ALL_TYPES("csa-pro",       PRO_CSA,       0),
    BENCH_ALL_TYPES("hca-pro",       PRO_HCA,       0),
    BENCH_ALL_TYPES("indexer-pro",   PRO_INDEXER,   0),
    BENCH_DECODES("csa-flash-bf16",  PAIRS),
    BENCH_DECODES("csa-flash-tiles", TILES),
    BENCH_CASE("csa-flash-f32-pool",             FLASH_CSA,     F32,  PAIRS, POOL,    2048,  1, 0, PLAIN),
    BENCH_CASE("hca-flash-f32-pool",             FLASH_HCA,     F32,  PAIRS, POOL,    2048,  1, 0, PLAIN),
    BENCH_CASE("csa-flash-f32-fp8-pool",         FLASH_CSA,     F32,  PAIRS, POOL,    2048,  1, 0, FP8),
    BENCH_CASE("csa-flash-bf16-fp8-prefill",     FLASH_CSA,     BF16, PAIRS, PREFILL, 2048,  0, 0, FP8),
    BENCH_CASE("indexer-flash-bf16-fp4-prefill", FLASH_INDEXER, BF16, PAIRS, PREFILL, 2048,  0, 0, FP4),
    BENCH_CASE("unpack-fp8",                     FLASH_CSA,     BF16, PAIRS, UNPACK,  65536, 1, 0, FP8),
};
/* clang-format on */
enum { BENCH_CASES = sizeof bench_cases / sizeof bench_cases[0] };

/* ============================================================================================================
 * The work of a case
 * ============================================================================================================ */

enum { BENCH_BLOCKS = 32, BENCH_LAYERS_A_RUN = 16 };

typedef struct bench_work {
    const bench_case *what;
    const char *isa;
    dsv4_config config;
    dsv4_compressor **layers; /* one; for decoding as many as it takes to be larger than the last-level cache */
    int64_t layer_count, layer;
    dsv4_workspace **workspaces; /* one a layer */
    dsv4_state **states;         /* [layer_count, count] of a decoding case */
    dsv4_segment *segments;      /* [layer_count, count], or the one */
    dsv4_batch batch;
    dsv4_gradients gradients;
    bench_cold *cold;
    void *blocks[BENCH_BLOCKS];
    int block_count;
    double tokens, flops, bytes; /* of one run */
    size_t packed_bytes;         /* of them, rows and scales that are unpacked */
    dsv4_error error;
    int failed;
} bench_work;

static void bench_fail(bench_work *work, const char *text) {
    if (!work->failed) snprintf(work->error.text, sizeof work->error.text, "%s", text);
    work->failed = 1;
}

/* Memory that lives as long as the work; NULL marks it failed. */
static void *bench_take(bench_work *work, size_t size) {
    void *block = NULL;
    if (work->block_count == BENCH_BLOCKS || posix_memalign(&block, DSV4_ALIGNMENT, size ? size : 1) != 0) {
        bench_fail(work, "not enough memory");
        return NULL;
    }
    memset(block, 0, size);
    work->blocks[work->block_count++] = block;
    return block;
}

/* splitmix64 */
static uint64_t bench_random(uint64_t *seed) {
    uint64_t z = *seed += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static void bench_random_f32(float *numbers, size_t count, uint64_t seed) {
    for (size_t i = 0; i < count; i++) numbers[i] = (float)(int32_t)(bench_random(&seed) >> 32) * 0x1p-31f;
}

/* `count` numbers, uniform in [-1, 1), in the case's dtype. */
static void *bench_random_array(bench_work *work, int64_t count, uint64_t seed) {
    const size_t n = (size_t)count;
    float *numbers = (float *)bench_take(work, n * sizeof(float));
    dsv4_bf16 *rounded;
    if (!numbers) return NULL;
    bench_random_f32(numbers, n, seed);
    if (work->what->dtype == DSV4_F32) return numbers;
    rounded = (dsv4_bf16 *)bench_take(work, n * sizeof(dsv4_bf16));
    if (rounded) dsv4_bf16_from_f32_array(rounded, numbers, n);
    return rounded;
}

static void bench_check(bench_work *work, dsv4_status status) {
    if (status != DSV4_OK) work->failed = 1;
}

/* Weights from the library's initialiser; every layer gets the same numbers in memory of its own. */
static void bench_make_layers(bench_work *work) {
    const dsv4_allocator heap = dsv4_heap();
    dsv4_options options = {0};
    dsv4_param_info info[DSV4_PARAM_COUNT];
    dsv4_params params = {0};
    dsv4_const_matrix *const arrays[DSV4_PARAM_COUNT] = {&params.wkv, &params.wgate, &params.ape, &params.norm};
    bench_check(work, dsv4_config_params(&work->config, info, &work->error));
    for (int p = 0; p < DSV4_PARAM_COUNT && !work->failed; p++) {
        dsv4_matrix array = {NULL, p == DSV4_APE ? DSV4_F32 : work->what->dtype, 0}; /* as in the checkpoints */
        array.data = bench_take(work, (size_t)info[p].count * dsv4_dtype_size(array.dtype));
        if (!array.data) return;
        bench_check(work, dsv4_param_init(&work->config, (dsv4_param)p, 1, array, &work->error));
        *arrays[p] = (dsv4_const_matrix){array.data, array.dtype, 0};
    }
    if (work->what->kind == BENCH_DECODE)
        work->layer_count = 1 + (int64_t)work->cold->size / (2 * info[DSV4_WKV].count * 2);
    work->layers = (dsv4_compressor **)bench_take(work, (size_t)work->layer_count * sizeof *work->layers);
    work->workspaces = (dsv4_workspace **)bench_take(work, (size_t)work->layer_count * sizeof *work->workspaces);
    options.isa = work->isa;
    options.training = work->what->kind == BENCH_BACKWARD;
    for (int64_t i = 0; i < work->layer_count && !work->failed; i++)
        bench_check(work,
                    dsv4_compressor_create(&work->config, &params, &options, &heap, &work->layers[i], &work->error));
}

/* Sequence s of each layer has already seen s mod ratio tokens, so that windows do not all close at once. */
static void bench_make_streams(bench_work *work) {
    const dsv4_allocator heap = dsv4_heap();
    const int64_t count = work->what->count;
    work->states = (dsv4_state **)bench_take(work, (size_t)(work->layer_count * count) * sizeof *work->states);
    for (int64_t i = 0; i < work->layer_count * count && !work->failed; i++) {
        dsv4_segment *segment = &work->segments[i];
        bench_check(work, dsv4_state_create(work->layers[i / count], 0, &heap, &work->states[i], &work->error));
        segment->state = work->states[i];
        segment->count = i % count % work->config.ratio;
        segment->entry = i % count;
        work->batch.segments = segment;
        work->batch.segment_count = 1;
        if (!work->failed)
            bench_check(
                work, dsv4_compress(work->layers[i / count], &work->batch, work->workspaces[i / count], &work->error));
        segment->position = segment->count;
        segment->token = i % count;
        segment->count = 1;
    }
}

static void bench_make_batch(bench_work *work) {
    const bench_case *what = work->what;
    const int64_t rows = what->count + work->config.ratio; /* a decoding stream's first tokens are rows 0 ... */
    const int decode = what->kind == BENCH_DECODE;
    dsv4_batch *batch = &work->batch;
    batch->tokens = decode ? rows : what->count;
    batch->entries = decode || what->kind == BENCH_UNPACK ? what->count : what->count / work->config.ratio;
    batch->x.dtype = batch->out.dtype = what->dtype;
    if (!what->cold || decode) batch->x.data = bench_random_array(work, rows * work->config.hidden_dim, 2);
    batch->out.data = bench_take(work, (size_t)(batch->entries * work->config.head_dim) * dsv4_dtype_size(what->dtype));
    work->segments =
        (dsv4_segment *)bench_take(work, (size_t)(decode ? work->layer_count * what->count : 1) * sizeof(dsv4_segment));
    batch->segments = work->segments;
    batch->segment_count = decode ? what->count : 1;
    if (work->segments && !decode) work->segments[0].count = what->count;
    if (what->rows == DSV4_ROWS_PLAIN || what->kind == BENCH_UNPACK) return;
    size_t row = 0, scales = 0;
    bench_check(work, dsv4_row_sizes(&work->config, &row, &scales, &work->error));
    batch->out.data = bench_take(work, (size_t)batch->entries * row);
    batch->scales.data = bench_take(work, (size_t)batch->entries * scales);
    batch->out.dtype = batch->scales.dtype = DSV4_PACKED;
}

/* The forward pass keeps kv and gate, so that the backward pass multiplies nothing twice. */
static void bench_make_gradients(bench_work *work) {
    dsv4_param_info info[DSV4_PARAM_COUNT];
    dsv4_gradients *g = &work->gradients;
    dsv4_matrix *const arrays[DSV4_PARAM_COUNT] = {&g->dwkv, &g->dwgate, &g->dape, &g->dnorm};
    bench_check(work, dsv4_config_params(&work->config, info, &work->error));
    for (int p = 0; p < DSV4_PARAM_COUNT; p++)
        *arrays[p] = (dsv4_matrix){bench_take(work, (size_t)info[p].count * sizeof(float)), DSV4_F32, 0};
    g->dout.data = bench_random_array(work, work->batch.entries * work->config.head_dim, 3);
    g->dout.dtype = g->dx.dtype = work->what->dtype;
    g->dx.data =
        bench_take(work, (size_t)(work->what->count * info[DSV4_WKV].columns) * dsv4_dtype_size(work->what->dtype));
    const size_t projected = (size_t)(work->what->count * info[DSV4_WKV].rows) * sizeof(float);
    work->batch.stages.kv = (float *)bench_take(work, projected);
    work->batch.stages.gate = (float *)bench_take(work, projected);
    if (work->failed) return;
    bench_check(work, dsv4_compress(work->layers[0], &work->batch, work->workspaces[0], &work->error));
    work->batch.kv = work->batch.stages.kv;
    work->batch.gate = work->batch.stages.gate;
    memset(&work->batch.stages, 0, sizeof work->batch.stages);
}

/* What one run amounts to. A multiply-add counts as two. */
static void bench_count(bench_work *work) {
    const bench_case *what = work->what;
    const double columns = (double)(work->config.overlap ? 2 : 1) * (double)work->config.head_dim;
    const double weights = 2.0 * columns * (double)work->config.hidden_dim; /* wkv and wgate */
    const double runs = what->kind == BENCH_DECODE ? (double)BENCH_LAYERS_A_RUN : 1.0;
    work->tokens = runs * (double)what->count;
    work->flops = 2.0 * work->tokens * weights;
    work->bytes = runs * weights * (double)dsv4_dtype_size(what->dtype);
    if (what->kind == BENCH_BACKWARD) work->flops *= 2.0;
    if (what->kind == BENCH_POOL) { /* weight times kv, once for each kv; kv and gate are read */
        work->flops = 2.0 * work->tokens * columns;
        work->bytes = 2.0 * work->tokens * columns * sizeof(float);
    }
    if (what->kind == BENCH_UNPACK) { /* rows and scales are read, numbers are written; a product each */
        size_t row = 0, scales = 0;
        bench_check(work, dsv4_row_sizes(&work->config, &row, &scales, &work->error));
        work->tokens = (double)(what->count * work->config.ratio);
        work->flops = (double)(what->count * work->config.head_dim);
        work->packed_bytes = (size_t)what->count * (row + scales);
        work->bytes = (double)work->packed_bytes + work->flops * (double)dsv4_dtype_size(what->dtype);
    }
}

/* Uses the threads of `parallel` from now on. */
static void bench_work_threads(bench_work *work, const dsv4_parallel *parallel) {
    const dsv4_allocator heap = dsv4_heap();
    for (int64_t i = 0; i < work->layer_count && !work->failed; i++) {
        dsv4_workspace_destroy(work->workspaces[i]);
        work->workspaces[i] = NULL;
        bench_check(work, dsv4_workspace_create(work->layers[i], parallel, &heap, &work->workspaces[i], &work->error));
    }
}

/* On failure work->failed is set and work->error.text says why; bench_work_free is due in any case. */
static void bench_work_make(bench_work *work, const bench_case *what, const char *isa, bench_cold *cold) {
    memset(work, 0, sizeof *work);
    work->what = what;
    work->isa = isa;
    work->cold = cold;
    work->layer_count = 1;
    work->config = dsv4_preset_config(what->preset);
    work->config.sums = what->sums;
    work->config.rows = what->rows;
    if (what->dtype == DSV4_F32) work->config.rounding = DSV4_ROUNDING_NONE;
    bench_make_layers(work);
    bench_work_threads(work, NULL);
    bench_make_batch(work);
    if (!work->failed && what->kind == BENCH_DECODE) bench_make_streams(work);
    if (!work->failed && what->kind == BENCH_BACKWARD) bench_make_gradients(work);
    bench_count(work);
}

static void bench_work_free(bench_work *work) {
    const int64_t streams = work->states ? work->layer_count * work->what->count : 0;
    for (int64_t i = 0; i < streams; i++) dsv4_state_destroy(work->states[i]);
    for (int64_t i = 0; work->workspaces && i < work->layer_count; i++) {
        dsv4_workspace_destroy(work->workspaces[i]);
        dsv4_compressor_destroy(work->layers[i]);
    }
    for (int i = 0; i < work->block_count; i++) free(work->blocks[i]);
    memset(work, 0, sizeof *work);
}

/* The next layer's step: each sequence brings one token. */
static dsv4_status bench_decode_step(bench_work *work) {
    dsv4_segment *segments = work->segments + work->layer * work->what->count;
    dsv4_status status;
    work->batch.segments = segments;
    work->batch.segment_count = work->what->count;
    status = dsv4_compress(work->layers[work->layer], &work->batch, work->workspaces[work->layer], &work->error);
    for (int64_t s = 0; s < work->what->count; s++) segments[s].position++;
    work->layer = (work->layer + 1) % work->layer_count;
    return status;
}

static dsv4_status bench_unpack(bench_work *work) {
    const unsigned char *rows = bench_cold_slice(work->cold, work->packed_bytes);
    const size_t count = (size_t)work->what->count, scales = 7 * count; /* one for each block of 64 channels of 448 */
    const dsv4_const_matrix packed = {rows, DSV4_PACKED, 0},
                            behind = {rows + work->packed_bytes - scales, DSV4_PACKED, 0};
    return dsv4_unpack(&work->config, work->what->count, packed, behind, work->batch.out, &work->error);
}

static dsv4_status bench_run_once(bench_work *work) {
    dsv4_status status = DSV4_OK;
    if (work->what->kind == BENCH_UNPACK) return bench_unpack(work);
    if (work->what->kind == BENCH_BACKWARD)
        return dsv4_backward(work->layers[0], &work->batch, &work->gradients, work->workspaces[0], &work->error);
    if (work->what->kind == BENCH_POOL) {
        const unsigned char *slice = bench_cold_slice(work->cold, (size_t)work->bytes);
        work->batch.kv = (const float *)(const void *)slice;
        work->batch.gate = (const float *)(const void *)(slice + (size_t)work->bytes / 2);
    }
    if (work->what->kind != BENCH_DECODE)
        return dsv4_compress(work->layers[0], &work->batch, work->workspaces[0], &work->error);
    for (int i = 0; i < BENCH_LAYERS_A_RUN && status == DSV4_OK; i++) status = bench_decode_step(work);
    return status;
}

#endif /* BENCH_CASES_H */
