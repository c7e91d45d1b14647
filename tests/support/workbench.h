/* workbench.h - the fixture of the suites: a compressor at work, with a sequence and what one call makes of it, forward
 * or backward; and everything else that a test needs until its end. */

#ifndef TESTS_WORKBENCH_H
#define TESTS_WORKBENCH_H

#include "oracle_backward.h" /* the names of gradients */
#include "shapes.h"

/* ---- Gradients --------------------------------------------------------------------------------------------- */

enum { GRADIENTS = ORACLE_GRADIENTS };

SUPPORT const char *gradient_name(int which) {
    static const char *const names[] = {"dx", "dwkv", "dwgate", "dape", "dnorm", "no gradient"};
    return names[which];
}

/* Arrays for every gradient that a configuration has, poisoned; NULL where it has none. */
typedef struct gradient_set {
    dsv4_dtype dtype;
    int64_t count[GRADIENTS];
    size_t bytes[GRADIENTS];
    void *data[GRADIENTS];
} gradient_set;

SUPPORT gradient_set gradient_set_new(const dsv4_config *config, dsv4_dtype dtype, int64_t tokens) {
    gradient_set g = {0};
    dsv4_param_info info[DSV4_PARAM_COUNT];
    if (dsv4_config_params(config, info, NULL) != DSV4_OK) exit(1);
    g.dtype = dtype;
    g.count[ORACLE_DX] = tokens * config->hidden_dim;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) g.count[ORACLE_DWKV + i] = info[i].count;
    for (int i = 0; i < GRADIENTS; i++) {
        g.bytes[i] = (size_t)g.count[i] * dsv4_dtype_size(dtype);
        g.data[i] = g.count[i] ? reserve(g.bytes[i]) : NULL;
        if (g.data[i]) memset(g.data[i], POISON, g.bytes[i]);
    }
    return g;
}

/* The first gradient from `first` on whose bytes differ, GRADIENTS where none does. */
SUPPORT int gradient_difference(const gradient_set *a, const gradient_set *b, int first) {
    for (int i = first; i < GRADIENTS; i++)
        if (a->bytes[i] != b->bytes[i] || (a->data[i] && memcmp(a->data[i], b->data[i], a->bytes[i]) != 0)) return i;
    return GRADIENTS;
}

SUPPORT int gradients_untouched(const gradient_set *g) {
    for (int i = 0; i < GRADIENTS; i++)
        if (!memory_untouched(g->data[i], g->bytes[i])) return 0;
    return 1;
}

SUPPORT dsv4_matrix *gradient_target(dsv4_gradients *to, int which) {
    dsv4_matrix *const targets[GRADIENTS] = {&to->dx, &to->dwkv, &to->dwgate, &to->dape, &to->dnorm};
    return targets[which];
}

/* The call's arguments for everything in the set. */
SUPPORT dsv4_gradients gradients_into(const gradient_set *g, const void *dout, dsv4_dtype dout_dtype) {
    dsv4_gradients to = {.dout = {dout, dout_dtype, 0}};
    for (int i = 0; i < GRADIENTS; i++) *gradient_target(&to, i) = matrix_of(g->data[i], g->dtype);
    return to;
}

/* ---- The fixture ------------------------------------------------------------------------------------------- */

/* Something that a workbench frees. */
typedef struct belonging {
    struct belonging *next;
    void (*release)(void *);
    void *thing;
} belonging;

/* Zeros are one, too, with nothing on it. It may be moved, but of copies one alone keeps things and is freed. Not for
 * several threads. */
typedef struct workbench {
    dsv4_config config;
    model m;
    engine e; /* best kernels, one thread; for training with room for bf16 sums */
    sequence s;
    int64_t entries;        /* that s comes to */
    dsv4_dtype out_dtype;   /* of entries and of dout */
    results whole;          /* where made by workbench_new: of the one call */
    void *dout;             /* [entries, D], where it is for training */
    gradient_set gradients; /* then: fp32, by one call that drops the tail */
    dsv4_segment all;       /* of workbench_batch */
    belonging *belongings;
} workbench;

/* The last one to come is the first to go: a state before its compressor. */
SUPPORT void workbench_free(workbench *w) {
    while (w->belongings) {
        belonging *last = w->belongings;
        w->belongings = last->next;
        last->release(last->thing);
        free(last);
    }
    memset(w, 0, sizeof *w);
}

SUPPORT void belongs_to(workbench *w, void (*release)(void *), void *thing) {
    belonging *b = reserve(sizeof *b);
    *b = (belonging){w->belongings, release, thing};
    w->belongings = b;
}

/* ---- What others made, to be freed with it ----------------------------------------------------------------- */

SUPPORT void *keep(workbench *w, void *memory) {
    belongs_to(w, free, memory);
    return memory;
}

SUPPORT model keep_model(workbench *w, model m) {
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) keep(w, m.data[i]);
    return m;
}

SUPPORT sequence keep_sequence(workbench *w, sequence s) {
    keep(w, s.x);
    return s;
}

SUPPORT results keep_results(workbench *w, results r) {
    for (int i = 0; i < STAGE_COUNT; i++) keep(w, r.stage[i]);
    keep(w, r.no_weights);
    return r;
}

SUPPORT gradient_set keep_gradients(workbench *w, gradient_set g) {
    for (int i = 0; i < GRADIENTS; i++) keep(w, g.data[i]);
    return g;
}

SUPPORT saved keep_saved(workbench *w, saved s) {
    keep(w, s.bytes);
    return s;
}

SUPPORT void release_compressor(void *compressor) { dsv4_compressor_destroy(compressor); }
SUPPORT void release_workspace(void *workspace) { dsv4_workspace_destroy(workspace); }
SUPPORT void release_state(void *state) { dsv4_state_destroy(state); }

SUPPORT engine keep_engine(workbench *w, engine e) {
    belongs_to(w, release_compressor, e.compressor);
    belongs_to(w, release_workspace, e.workspace);
    return e;
}

SUPPORT dsv4_state *keep_state(workbench *w, dsv4_state *state) {
    belongs_to(w, release_state, state);
    return state;
}

/* ---- More of what it has ----------------------------------------------------------------------------------- */

SUPPORT void *workbench_memory(workbench *w, size_t bytes) { return keep(w, reserve(bytes)); }

SUPPORT engine workbench_engine(workbench *w, const char *isa, const dsv4_parallel *parallel) {
    return keep_engine(w, engine_new(&w->m, isa, parallel));
}

SUPPORT engine workbench_trainer(workbench *w, const char *isa, const dsv4_parallel *parallel) {
    return keep_engine(w, trainer_new(&w->m, isa, parallel));
}

SUPPORT dsv4_state *workbench_state(workbench *w, int64_t depth) { return keep_state(w, state_new(&w->e, depth)); }

SUPPORT saved workbench_saved(workbench *w, const dsv4_state *state) { return keep_saved(w, saved_of(state)); }

SUPPORT results workbench_results_in(workbench *w, dsv4_dtype out_dtype) {
    return keep_results(w, results_new(&w->config, out_dtype, w->s.tokens, w->entries));
}

SUPPORT results workbench_results(workbench *w) { return workbench_results_in(w, w->out_dtype); }

SUPPORT gradient_set workbench_gradients(workbench *w, dsv4_dtype dtype) {
    return keep_gradients(w, gradient_set_new(&w->config, dtype, w->s.tokens));
}

SUPPORT dsv4_status workbench_compress(const workbench *w, const dsv4_batch *b) {
    return dsv4_compress(w->e.compressor, b, w->e.workspace, NULL);
}

SUPPORT dsv4_status workbench_backward(const workbench *w, const dsv4_batch *b, const dsv4_gradients *to) {
    return dsv4_backward(w->e.compressor, b, to, w->e.workspace, NULL);
}

/* All of its sequence, as one segment; a batch over it that drops the tail and writes every stage of `r`. */
SUPPORT dsv4_batch workbench_batch(workbench *w, const results *r) {
    w->all = segment_new(0, w->s.tokens, w->s.position, 0, NULL);
    dsv4_batch b = batch_new(&w->s, r, &w->all, 1);
    b.drop_tail = 1;
    return b;
}

/* A batch over its sequence for the backward pass. */
SUPPORT dsv4_batch backward_batch(const workbench *w, const dsv4_segment *segments, int64_t count) {
    dsv4_batch b = batch_reading(&w->s, w->entries, segments, count);
    b.drop_tail = 1;
    return b;
}

SUPPORT dsv4_batch backward_whole_batch(workbench *w) {
    w->all = segment_new(0, w->s.tokens, w->s.position, 0, NULL);
    return backward_batch(w, &w->all, 1);
}

/* `count` sequences of nought to `most` tokens, one after another, and their entries alike. */
SUPPORT dsv4_segment *short_segments(workbench *w, int count, int64_t most, uint64_t seed) {
    dsv4_segment *segments = workbench_memory(w, (size_t)count * sizeof *segments);
    dice d = {seed};
    int64_t token = 0, entry = 0;
    for (int i = 0; i < count; i++) {
        segments[i] = segment_new(token, dice_below(&d, most + 1), i, entry, NULL);
        token += segments[i].count;
        entry += segments[i].count / w->config.ratio;
    }
    return segments;
}

/* Every gradient of the whole sequence in one call. */
SUPPORT dsv4_status backward_whole(const workbench *w, const engine *e, const gradient_set *g) {
    const dsv4_segment all = segment_new(0, w->s.tokens, w->s.position, 0, NULL);
    dsv4_batch b = backward_batch(w, &all, 1);
    dsv4_gradients to = gradients_into(g, w->dout, w->out_dtype);
    return dsv4_backward(e->compressor, &b, &to, e->workspace, NULL);
}

#define ASSERT_SAME_BITS(expected, got, what)                                                       \
    do {                                                                                            \
        int stage_found = results_difference(expected, got);                                        \
        ASSERTm(note("%s differs: %s", stage_name(stage_found), what), stage_found == STAGE_COUNT); \
    } while (0)

/* ---- Setting it up ----------------------------------------------------------------------------------------- */

/* Takes over the model and the sequence; it has no engine yet. */
SUPPORT workbench workbench_with(model m, sequence s, dsv4_dtype out_dtype) {
    workbench w = {.config = m.config, .entries = s.tokens / m.config.ratio, .out_dtype = out_dtype};
    w.m = keep_model(&w, m);
    w.s = keep_sequence(&w, s);
    return w;
}

/* A compressor with everything in one type. */
SUPPORT workbench workbench_for(const dsv4_config *config, dsv4_dtype dtype, int64_t tokens, uint64_t seed) {
    workbench w = workbench_with(model_of(config, dtype, seed), sequence_new(config, dtype, tokens, seed + 1), dtype);
    w.e = workbench_engine(&w, NULL, NULL);
    return w;
}

/* A shape at work, from position 1000 on, and the results of the one call. */
SUPPORT workbench workbench_new(const shape *of, int64_t windows, uint64_t seed) {
    const int64_t tokens = windows * of->config.ratio;
    workbench w = workbench_with(shape_model(of, seed), shape_sequence(of, tokens, seed + 1), of->out);
    dsv4_error error = {0};
    w.s.position = 1000;
    w.e = workbench_engine(&w, NULL, NULL);
    w.whole = workbench_results(&w);
    if (compress_whole(&w.e, &w.s, &w.whole, &error) != DSV4_OK) {
        fprintf(stderr, "tests: %s: %s\n", of->name, error.text);
        exit(1);
    }
    return w;
}

/* For training: the gradient of the entries is given, and those of one call are there. */
SUPPORT workbench training_with(model m, sequence s, dsv4_dtype dout_dtype, uint64_t seed) {
    workbench w = workbench_with(m, s, dout_dtype);
    w.e = workbench_trainer(&w, NULL, NULL);
    w.dout = keep(&w, random_array(dout_dtype, w.entries * w.config.head_dim, seed, 1));
    w.gradients = workbench_gradients(&w, DSV4_F32);
    if (backward_whole(&w, &w.e, &w.gradients) != DSV4_OK) {
        fprintf(stderr, "tests: no gradients\n");
        exit(1);
    }
    return w;
}

/* ... of one type but for dout. */
SUPPORT workbench training_for(const dsv4_config *config, dsv4_dtype dtype, dsv4_dtype dout_dtype, int64_t tokens,
                               uint64_t seed) {
    return training_with(model_of(config, dtype, seed), sequence_new(config, dtype, tokens, seed + 1), dout_dtype,
                         seed + 2);
}

SUPPORT workbench training_new(const shape *of, int64_t tokens, uint64_t seed) {
    sequence s = shape_sequence(of, tokens, seed + 1);
    s.position = 1000;
    return training_with(shape_model(of, seed), s, of->out, seed + 2);
}

/* ---- One window -------------------------------------------------------------------------------------------- */

/* Four rows whose projections are given, one channel wide, disjoint; every parameter is 1. */
typedef struct window_case {
    float kv[4], gate[4];
    uint32_t rounding;
} window_case;

/* In one call, or, with a `cut`, in two through a state of that depth, after so many rows. `weights`: [4], or NULL. */
SUPPORT dsv4_status pool_window(const window_case *of, const char *isa, int64_t cut, int64_t depth, float *weights,
                                float *pooled) {
    static const float one = 1;
    const dsv4_const_matrix ones = {&one, DSV4_F32, 0};
    workbench w = {.m = {.params = {.wkv = ones, .wgate = ones, .norm = ones}}};
    w.m.config = (dsv4_config){.hidden_dim = 1, .head_dim = 1, .ratio = 4, .no_ape = 1, .rounding = of->rounding};
    w.e = workbench_engine(&w, isa, NULL);
    dsv4_state *state = cut > 0 ? workbench_state(&w, depth) : NULL;
    dsv4_status status = DSV4_OK;
    float out = 0;
    for (int64_t from = 0, to = cut > 0 ? cut : 4; from < 4 && status == DSV4_OK; from = to, to = 4) {
        const dsv4_segment part = segment_new(from, to - from, from, 0, state);
        dsv4_batch b = {.kv = of->kv, .gate = of->gate, .tokens = 4, .out = {&out, DSV4_F32, 0}, .entries = 1};
        b.segments = &part;
        b.segment_count = 1;
        b.stages.weights = weights;
        b.stages.pooled = pooled;
        status = dsv4_compress(w.e.compressor, &b, w.e.workspace, NULL);
    }
    workbench_free(&w);
    return status;
}

#endif /* TESTS_WORKBENCH_H */
