/* support.h - what the suites share: reproducible numbers, a compressor with parameters and scratch of its own, arrays
 * for a call's results, and streams fed in cuts. Uses the public API alone. */

#ifndef TESTS_SUPPORT_H
#define TESTS_SUPPORT_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dsv4_compressor.h"

#if defined(__GNUC__)
#define SUPPORT __attribute__((unused)) static
#else
#define SUPPORT static
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TESTS_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define TESTS_SANITIZED /* allocators that end the program instead of giving NULL */
#endif
#endif

enum { POISON = 0xA5 }; /* what result arrays hold before a call */

/* The rounding presets; and how many points there are. */
SUPPORT const struct {
    const char *name;
    uint32_t bits;
} roundings[] = {
#define ROUNDING_ROW(name, text, bits) {text, name},
    DSV4_ROUNDINGS(ROUNDING_ROW)};
enum {
#define ROUNDING_ONE(name, text, bits) +1
    ROUNDING_COUNT = sizeof roundings / sizeof *roundings,
    ROUNDING_POINTS = 0 DSV4_ROUNDING_POINTS(ROUNDING_ONE)
};

/* ---- Reproducible numbers (SplitMix64) --------------------------------------------------------------------- */

typedef struct dice {
    uint64_t state;
} dice;

SUPPORT uint64_t dice_next(dice *d) {
    uint64_t z = d->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* 0 ... n - 1 */
SUPPORT int64_t dice_below(dice *d, int64_t n) { return (int64_t)(dice_next(d) % (uint64_t)n); }

/* [-1, 1), a multiple of 2^-23 */
SUPPORT float dice_real(dice *d) { return (float)((int64_t)(dice_next(d) >> 40) - 8388608) / 8388608.0f; }

/* ---- Hashes (FNV-1a) --------------------------------------------------------------------------------------- */

SUPPORT const uint64_t hash_start = ((uint64_t)0xCBF29CE4u << 32) | 0x84222325u;

SUPPORT uint64_t hash_bytes(uint64_t hash, const unsigned char *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * (((uint64_t)0x100 << 32) | 0x1B3u);
    return hash;
}

/* ---- Arrays of either type --------------------------------------------------------------------------------- */

SUPPORT void *reserve(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) {
        fputs("tests: out of memory\n", stderr);
        exit(1);
    }
    return memory;
}

SUPPORT float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

SUPPORT uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

SUPPORT double number(const void *data, dsv4_dtype dtype, int64_t i) {
    if (dtype == DSV4_F32) return ((const float *)data)[i];
    return float_of_bits((uint32_t)((const uint16_t *)data)[i] << 16);
}

/* Stores a value; bf16 by cutting off the lower half, which is exact where `value` is a bf16 number. */
SUPPORT void set_number(void *data, dsv4_dtype dtype, int64_t i, float value) {
    if (dtype == DSV4_F32)
        ((float *)data)[i] = value;
    else
        ((uint16_t *)data)[i] = (uint16_t)(bits_of_float(value) >> 16);
}

/* `count` numbers uniform in [-scale, scale) */
SUPPORT void *random_array(dsv4_dtype dtype, int64_t count, uint64_t seed, float scale) {
    dice d = {seed};
    void *data = reserve((size_t)count * (dtype == DSV4_F32 ? 4 : 2));
    for (int64_t i = 0; i < count; i++) set_number(data, dtype, i, scale * dice_real(&d));
    return data;
}

SUPPORT int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Equal bits, or both NaN: payloads are nobody's promise. */
SUPPORT int same_number(double a, double b) { return (isnan(a) && isnan(b)) || (a == b && !signbit(a) == !signbit(b)); }

/* Numbers that are none, the largest, and the smallest. */
SUPPORT const struct {
    const char *name;
    uint32_t bits;
} specials[] = {
    {"nan", 0x7FC00000},     {"negative_nan", 0xFFC10000}, {"infinity", 0x7F800000},  {"minus_infinity", 0xFF800000},
    {"largest", 0x7F7F0000}, {"lowest", 0xFF7F0000},       {"subnormal", 0x00010000}, {"minus_zero", 0x80000000}};
enum { SPECIAL_LARGEST = 4, SPECIAL_SUBNORMAL = 6, SPECIAL_COUNT = sizeof specials / sizeof *specials };

/* Rows without gaps. */
SUPPORT dsv4_matrix matrix_of(void *data, dsv4_dtype dtype) {
    dsv4_matrix m = {data, dtype, 0};
    return m;
}

SUPPORT const char *dtype_name(dsv4_dtype dtype) { return dtype == DSV4_F32 ? "f32" : "bf16"; }

/* ---- A compressor ------------------------------------------------------------------------------------------ */

/* Parameters of a configuration: random, large enough for gates to matter. */
typedef struct model {
    dsv4_config config;
    dsv4_param_info info[DSV4_PARAM_COUNT];
    void *data[DSV4_PARAM_COUNT];
    dsv4_params params;
} model;

SUPPORT dsv4_const_matrix *model_array(dsv4_params *params, int i) {
    dsv4_const_matrix *const arrays[DSV4_PARAM_COUNT] = {&params->wkv, &params->wgate, &params->ape, &params->norm};
    return arrays[i];
}

SUPPORT model model_new(const dsv4_config *config, const dsv4_dtype dtype[DSV4_PARAM_COUNT], uint64_t seed) {
    model m = {0};
    m.config = *config;
    dsv4_error error = {0};
    if (dsv4_config_params(config, m.info, &error) != DSV4_OK) {
        fprintf(stderr, "tests: %s\n", error.text);
        exit(1);
    }
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        float scale = i == DSV4_WKV || i == DSV4_WGATE ? 2 / (float)sqrt((double)config->hidden_dim) : 1;
        if (m.info[i].count == 0) continue;
        m.data[i] = random_array(dtype[i], m.info[i].count, seed * DSV4_PARAM_COUNT + (uint64_t)i, scale);
        model_array(&m.params, i)->data = m.data[i];
        model_array(&m.params, i)->dtype = dtype[i];
    }
    return m;
}

/* All four arrays of one type. */
SUPPORT model model_of(const dsv4_config *config, dsv4_dtype dtype, uint64_t seed) {
    const dsv4_dtype all[DSV4_PARAM_COUNT] = {dtype, dtype, dtype, dtype};
    return model_new(config, all, seed);
}

SUPPORT void model_free(model *m) {
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) free(m->data[i]);
    memset(m, 0, sizeof *m);
}

/* Memory from dsv4_heap that begins as NaN, read as fp32 or bf16: what is used before it is set shows. */
SUPPORT void *nan_alloc(void *context, size_t size, size_t alignment) {
    dsv4_allocator heap = dsv4_heap();
    void *block = heap.alloc(heap.context, size, alignment);
    (void)context;
    if (block) memset(block, 0xFF, size);
    return block;
}

SUPPORT void nan_free(void *context, void *pointer, size_t size) {
    dsv4_allocator heap = dsv4_heap();
    (void)context;
    heap.free(heap.context, pointer, size);
}

SUPPORT dsv4_allocator nan_heap(void) {
    dsv4_allocator a = {nan_alloc, nan_free, NULL};
    return a;
}

/* The kernel set that a compressor gets which names none: tiles are for the order TILES alone. */
SUPPORT const char *best_isa(dsv4_sums sums) {
    int i = strcmp(dsv4_isa_name(0), "amx") == 0 && sums == DSV4_SUMS_PAIRS;
    i += strcmp(dsv4_isa_name(i), "amx-model") == 0; /* which is taken where it is asked for alone */
    return dsv4_isa_name(i);
}

/* How many kernel sets this CPU has. */
SUPPORT int isa_count(void) {
    int count = 1; /* scalar at least */
    while (dsv4_isa_name(count)) count++;
    return count;
}

/* The next kernel set of this CPU; NULL after the last. */
SUPPORT const char *isa_after(const char *isa) {
    int i = 0;
    while (strcmp(dsv4_isa_name(i), isa) != 0) i++;
    return dsv4_isa_name(i + 1);
}

/* A compressor and one workspace. */
typedef struct engine {
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
} engine;

/* parallel: NULL for none. Ends the program where that fails: tests of failing have their own. */
SUPPORT engine engine_with(const model *m, const dsv4_options *options, const dsv4_parallel *parallel) {
    engine e = {0};
    dsv4_error error = {0};
    dsv4_allocator heap = nan_heap();
    if (dsv4_compressor_create(&m->config, &m->params, options, &heap, &e.compressor, &error) != DSV4_OK ||
        dsv4_workspace_create(e.compressor, parallel, &heap, &e.workspace, &error) != DSV4_OK) {
        fprintf(stderr, "tests: %s\n", error.text);
        exit(1);
    }
    return e;
}

/* isa: NULL for the best. */
SUPPORT engine engine_new(const model *m, const char *isa, const dsv4_parallel *parallel) {
    const dsv4_options options = {isa, 0, 0};
    return engine_with(m, &options, parallel);
}

/* The same for training, gradients in bf16 too. */
SUPPORT engine trainer_new(const model *m, const char *isa, const dsv4_parallel *parallel) {
    const dsv4_options options = {isa, 1, 1};
    return engine_with(m, &options, parallel);
}

SUPPORT void engine_free(engine *e) {
    dsv4_workspace_destroy(e->workspace);
    dsv4_compressor_destroy(e->compressor);
    memset(e, 0, sizeof *e);
}

SUPPORT dsv4_state *state_new(const engine *e, int64_t depth) {
    dsv4_state *state = NULL;
    dsv4_error error = {0};
    dsv4_allocator heap = nan_heap();
    if (dsv4_state_create(e->compressor, depth, &heap, &state, &error) != DSV4_OK) {
        fprintf(stderr, "tests: %s\n", error.text);
        exit(1);
    }
    return state;
}

/* What save writes: two states with equal bytes are the same stream. */
typedef struct saved {
    unsigned char *bytes; /* to be freed */
    size_t size;
} saved;

SUPPORT saved saved_of(const dsv4_state *state) {
    saved s = {NULL, dsv4_state_save_size(state)};
    size_t written = 0;
    s.bytes = reserve(s.size);
    memset(s.bytes, 0, s.size);
    if (dsv4_state_save(state, s.bytes, s.size, &written, NULL) != DSV4_OK || written != s.size) {
        fputs("tests: a state was not saved in the size it named\n", stderr);
        exit(1);
    }
    return s;
}

SUPPORT int same_bytes(const saved *a, const saved *b) {
    return a->size == b->size && memcmp(a->bytes, b->bytes, a->size) == 0;
}

SUPPORT int is_still(const dsv4_state *state, const saved *before) {
    saved now = saved_of(state);
    int same = same_bytes(&now, before);
    free(now.bytes);
    return same;
}

/* ---- Results ----------------------------------------------------------------------------------------------- */

enum { STAGE_KV, STAGE_GATE, STAGE_WEIGHTS, STAGE_POOLED, STAGE_LATENT, STAGE_OUT, STAGE_COUNT };
SUPPORT const char *stage_name(int stage) {
    static const char *const names[] = {"kv", "gate", "weights", "pooled", "latent", "out", "no stage"};
    return names[stage];
}

/* Arrays for everything that a call of `tokens` tokens and `entries` entries can write, poisoned. */
typedef struct results {
    dsv4_dtype out_dtype;
    int64_t tokens, entries;
    int64_t count[STAGE_COUNT];
    size_t bytes[STAGE_COUNT];
    void *stage[STAGE_COUNT];
    int *no_weights; /* some call could not be asked for softmax weights: its state had folded the rows */
} results;

SUPPORT results results_new(const dsv4_config *config, dsv4_dtype out_dtype, int64_t tokens, int64_t entries) {
    results r = {0};
    int64_t coff = config->overlap ? 2 : 1;
    r.out_dtype = out_dtype;
    r.tokens = tokens;
    r.entries = entries;
    r.no_weights = reserve(sizeof *r.no_weights);
    *r.no_weights = 0;
    r.count[STAGE_KV] = tokens * coff * config->head_dim;
    r.count[STAGE_GATE] = config->no_gate ? 0 : r.count[STAGE_KV];
    r.count[STAGE_WEIGHTS] = entries * coff * config->ratio * config->head_dim;
    r.count[STAGE_POOLED] = r.count[STAGE_LATENT] = r.count[STAGE_OUT] = entries * config->head_dim;
    for (int i = 0; i < STAGE_COUNT; i++) {
        int narrow = out_dtype == DSV4_BF16 && (i == STAGE_LATENT || i == STAGE_OUT);
        r.bytes[i] = (size_t)r.count[i] * (narrow ? 2 : 4);
        r.stage[i] = reserve(r.bytes[i]);
        memset(r.stage[i], POISON, r.bytes[i]);
    }
    return r;
}

SUPPORT void results_free(results *r) {
    for (int i = 0; i < STAGE_COUNT; i++) free(r->stage[i]);
    free(r->no_weights);
    memset(r, 0, sizeof *r);
}

/* The first stage whose bytes differ, STAGE_COUNT where none does. */
SUPPORT int results_difference(const results *a, const results *b) {
    for (int i = 0; i < STAGE_COUNT; i++) {
        if (i == STAGE_WEIGHTS && (*a->no_weights || *b->no_weights)) continue;
        if (a->bytes[i] != b->bytes[i] || memcmp(a->stage[i], b->stage[i], a->bytes[i]) != 0) return i;
    }
    return STAGE_COUNT;
}

SUPPORT int memory_untouched(const void *memory, size_t bytes) {
    for (size_t k = 0; k < bytes; k++)
        if (((const unsigned char *)memory)[k] != POISON) return 0;
    return 1;
}

SUPPORT int results_untouched(const results *r) {
    for (int i = 0; i < STAGE_COUNT; i++)
        if (!memory_untouched(r->stage[i], r->bytes[i])) return 0;
    return 1;
}

SUPPORT double result(const results *r, int stage, int64_t i) {
    int narrow = stage == STAGE_LATENT || stage == STAGE_OUT;
    return number(r->stage[stage], narrow ? r->out_dtype : DSV4_F32, i);
}

/* ---- Sequences and calls ----------------------------------------------------------------------------------- */

typedef struct sequence {
    void *x; /* [tokens, H] */
    dsv4_dtype dtype;
    int64_t tokens;
    int64_t position; /* of the first token */
} sequence;

SUPPORT sequence sequence_new(const dsv4_config *config, dsv4_dtype dtype, int64_t tokens, uint64_t seed) {
    sequence s = {random_array(dtype, tokens * config->hidden_dim, seed, 1), dtype, tokens, 0};
    return s;
}

SUPPORT void sequence_free(sequence *s) {
    free(s->x);
    memset(s, 0, sizeof *s);
}

/* A batch that reads `s` and is to write nothing yet; the segments are the caller's. */
SUPPORT dsv4_batch batch_reading(const sequence *s, int64_t entries, const dsv4_segment *segments, int64_t count) {
    dsv4_batch b = {.x = {s->x, s->dtype, 0}, .tokens = s->tokens, .entries = entries};
    b.segments = segments;
    b.segment_count = count;
    return b;
}

/* ... that writes every stage of `r`. */
SUPPORT dsv4_batch batch_new(const sequence *s, const results *r, const dsv4_segment *segments, int64_t count) {
    dsv4_batch b = batch_reading(s, r->entries, segments, count);
    b.out = matrix_of(r->stage[STAGE_OUT], r->out_dtype);
    b.stages.kv = r->stage[STAGE_KV];
    b.stages.gate = r->count[STAGE_GATE] ? r->stage[STAGE_GATE] : NULL;
    b.stages.weights = r->stage[STAGE_WEIGHTS];
    b.stages.pooled = r->stage[STAGE_POOLED];
    b.stages.latent = r->stage[STAGE_LATENT];
    return b;
}

SUPPORT dsv4_segment segment_new(int64_t token, int64_t count, int64_t position, int64_t entry, dsv4_state *state) {
    return (dsv4_segment){.token = token, .count = count, .position = position, .entry = entry, .state = state};
}

/* The whole sequence in one call, its tail dropped; every stage. */
SUPPORT dsv4_status compress_whole(const engine *e, const sequence *s, const results *r, dsv4_error *error) {
    dsv4_segment whole = segment_new(0, s->tokens, s->position, 0, NULL);
    dsv4_batch b = batch_new(s, r, &whole, 1);
    b.drop_tail = 1;
    return dsv4_compress(e->compressor, &b, e->workspace, error);
}

/* The depth at which a state has every row of the windows that are open. */
SUPPORT int64_t depth_for_weights(const dsv4_config *c) { return c->ratio * (c->overlap ? 2 : 1) - 1; }

/* Whether the windows that `count` more tokens close can be weighed row by row. */
SUPPORT int has_weights(const dsv4_config *c, const dsv4_state *state, int64_t count) {
    const int64_t tokens = dsv4_state_tokens(state), folded = tokens - dsv4_state_reach(state);
    const int64_t first = (tokens / c->ratio - (c->overlap ? 1 : 0)) * c->ratio;
    return (c->rounding & (DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT)) || dsv4_entry_count(c, state, count) == 0 ||
           c->ratio <= (c->overlap ? 1 : 2) || folded == 0 || folded <= first;
}

/* Feeds tokens [from, to) of the sequence into a state in one call. Entries lie in `r` where the one call puts them. */
SUPPORT dsv4_status compress_part(const engine *e, const sequence *s, const results *r, dsv4_state *state, int64_t from,
                                  int64_t to, dsv4_error *error) {
    int64_t ratio = dsv4_compressor_config(e->compressor)->ratio;
    dsv4_segment part = segment_new(from, to - from, s->position + from, dsv4_state_tokens(state) / ratio, state);
    dsv4_batch b = batch_new(s, r, &part, 1);
    if (!has_weights(dsv4_compressor_config(e->compressor), state, to - from)) {
        b.stages.weights = NULL;
        *r->no_weights = 1;
    }
    return dsv4_compress(e->compressor, &b, e->workspace, error);
}

/* The whole sequence through a fresh state, `lengths` (used over and over) tokens at a time. */
SUPPORT dsv4_status compress_cut_at(const engine *e, const sequence *s, const results *r, const int64_t *lengths,
                                    int length_count, int64_t depth, dsv4_error *error) {
    dsv4_state *state = state_new(e, depth);
    dsv4_status status = DSV4_OK;
    int64_t from = 0;
    for (int i = 0; from < s->tokens && status == DSV4_OK; i++) {
        int64_t to = least(from + lengths[i % length_count], s->tokens);
        status = compress_part(e, s, r, state, from, to, error);
        from = to;
    }
    dsv4_state_destroy(state);
    return status;
}

/* The same through a state that keeps all rows. */
SUPPORT dsv4_status compress_cut(const engine *e, const sequence *s, const results *r, const int64_t *lengths,
                                 int length_count, dsv4_error *error) {
    const int64_t depth = depth_for_weights(dsv4_compressor_config(e->compressor));
    return compress_cut_at(e, s, r, lengths, length_count, depth, error);
}

/* ---- Allocators that watch and fail ------------------------------------------------------------------------ */

typedef struct ledger {
    int64_t calls, live; /* allocations asked for; blocks not yet freed */
    size_t live_bytes, last_size, last_alignment;
    int64_t fail_at; /* the allocation (1, 2, ...) that gives NULL; 0: none */
    int wrong;       /* a block freed with another size than it was asked for, or none of ours */
} ledger;

typedef struct ledger_block {
    void *memory; /* what malloc gave */
    size_t size;
} ledger_block;

SUPPORT void *ledger_alloc(void *context, size_t size, size_t alignment) {
    ledger *l = context;
    l->last_size = size;
    l->last_alignment = alignment;
    if (++l->calls == l->fail_at) return NULL;
    unsigned char *memory = reserve(size + alignment + sizeof(ledger_block));
    uintptr_t start = (uintptr_t)memory + sizeof(ledger_block);
    unsigned char *block = memory + sizeof(ledger_block) + (alignment - start % alignment) % alignment;
    ledger_block note_of_it = {memory, size};
    memcpy(block - sizeof note_of_it, &note_of_it, sizeof note_of_it);
    memset(block, 0xFF, size); /* NaN */
    l->live++;
    l->live_bytes += size;
    return block;
}

SUPPORT void ledger_free(void *context, void *pointer, size_t size) {
    ledger *l = context;
    ledger_block note_of_it;
    memcpy(&note_of_it, (unsigned char *)pointer - sizeof note_of_it, sizeof note_of_it);
    l->wrong |= note_of_it.size != size;
    l->live--;
    l->live_bytes -= size;
    free(note_of_it.memory);
}

SUPPORT dsv4_allocator ledger_allocator(ledger *l) {
    dsv4_allocator a = {ledger_alloc, ledger_free, l};
    return a;
}

#endif /* TESTS_SUPPORT_H */
