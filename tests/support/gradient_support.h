/* gradient_support.h - what tests of the backward pass share: a shape with a sequence and the gradient of its entries,
 * and its gradients in one call, through cuts, or by the oracle. */

#ifndef TESTS_GRADIENT_SUPPORT_H
#define TESTS_GRADIENT_SUPPORT_H

#include "oracle_backward.h"
#include "oracle_support.h"
#include "shapes.h"

enum { GRADIENTS = ORACLE_GRADIENTS };

SUPPORT const char *gradient_name(int which) {
    static const char *const names[] = {"dx", "dwkv", "dwgate", "dape", "dnorm", "no gradient"};
    return names[which];
}

/* ---- Arrays ------------------------------------------------------------------------------------------------ */

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

SUPPORT void gradient_set_free(gradient_set *g) {
    for (int i = 0; i < GRADIENTS; i++) free(g->data[i]);
    memset(g, 0, sizeof *g);
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

/* The call's arguments for everything in the set. */
SUPPORT dsv4_gradients gradients_into(const gradient_set *g, const void *dout, dsv4_dtype dout_dtype) {
    dsv4_gradients to = {0};
    dsv4_matrix *const targets[GRADIENTS] = {&to.dx, &to.dwkv, &to.dwgate, &to.dape, &to.dnorm};
    to.dout.data = dout;
    to.dout.dtype = dout_dtype;
    for (int i = 0; i < GRADIENTS; i++) {
        targets[i]->data = g->data[i];
        targets[i]->dtype = g->dtype;
    }
    return to;
}

/* ---- A sequence with the gradient of its entries ----------------------------------------------------------- */

typedef struct backward_case {
    dsv4_config config;
    model m;
    engine e; /* best kernels, one thread, room for bf16 sums */
    sequence s;
    void *dout; /* [entries, D] */
    dsv4_dtype dout_dtype;
    int64_t entries;
    gradient_set whole; /* fp32, by one call that drops the tail */
} backward_case;

/* A batch over the backward_case's tokens, for the backward pass. */
SUPPORT dsv4_batch backward_case_batch(const backward_case *l, const dsv4_segment *segments, int64_t count) {
    dsv4_batch b = {0};
    b.x.data = l->s.x;
    b.x.dtype = l->s.dtype;
    b.tokens = l->s.tokens;
    b.entries = l->entries;
    b.segments = segments;
    b.segment_count = count;
    b.drop_tail = 1;
    return b;
}

/* Every gradient of the whole sequence in one call. */
SUPPORT dsv4_status backward_whole(const backward_case *l, const engine *e, const gradient_set *g) {
    dsv4_segment whole = segment_new(0, l->s.tokens, l->s.position, 0, NULL);
    dsv4_batch b = backward_case_batch(l, &whole, 1);
    dsv4_gradients to = gradients_into(g, l->dout, l->dout_dtype);
    return dsv4_backward(e->compressor, &b, &to, e->workspace, NULL);
}

/* Takes over the model and the sequence. */
SUPPORT backward_case backward_case_new(model m, sequence s, dsv4_dtype dout_dtype, uint64_t seed) {
    backward_case l = {0};
    l.config = m.config;
    l.m = m;
    l.s = s;
    l.e = trainer_new(&l.m, NULL, NULL);
    l.dout_dtype = dout_dtype;
    l.entries = s.tokens / l.config.ratio;
    l.dout = random_array(dout_dtype, l.entries * l.config.head_dim, seed, 1);
    l.whole = gradient_set_new(&l.config, DSV4_F32, s.tokens);
    if (backward_whole(&l, &l.e, &l.whole) != DSV4_OK) {
        fprintf(stderr, "tests: no gradients\n");
        exit(1);
    }
    return l;
}

SUPPORT backward_case backward_case_of(const shape *of, int64_t tokens, uint64_t seed) {
    sequence s = shape_sequence(of, tokens, seed + 1);
    s.position = 1000;
    return backward_case_new(shape_model(of, seed), s, of->out, seed + 2);
}

SUPPORT void backward_case_free(backward_case *l) {
    gradient_set_free(&l->whole);
    free(l->dout);
    sequence_free(&l->s);
    engine_free(&l->e);
    model_free(&l->m);
}

/* ---- In parts ---------------------------------------------------------------------------------------------- */

/* A sequence cut into parts: the state before each, and the gradient of each state. */
typedef struct backward_parts {
    int64_t count;
    int64_t *from;         /* [count + 1] */
    dsv4_state **state;    /* [count] */
    dsv4_state **gradient; /* [count + 1]; of the last: NULL */
} backward_parts;

/* The forward pass through a state, `lengths` (over and over) tokens at a time; the states before each part stay. */
SUPPORT backward_parts backward_case_cut(const backward_case *l, const engine *e, const int64_t *lengths,
                                         int length_count) {
    backward_parts p = {0};
    results r = results_new(&l->config, DSV4_F32, l->s.tokens, l->entries);
    dsv4_state *state = state_new(e, 0);
    p.from = reserve((size_t)(l->s.tokens + 1) * sizeof *p.from);
    p.state = reserve((size_t)(l->s.tokens + 1) * sizeof *p.state);
    p.gradient = reserve((size_t)(l->s.tokens + 1) * sizeof *p.gradient);
    p.from[0] = 0;
    for (; p.from[p.count] < l->s.tokens; p.count++) {
        const int64_t length = lengths[p.count % length_count], left = l->s.tokens - p.from[p.count];
        p.from[p.count + 1] = p.from[p.count] + (length < left ? length : left);
        p.state[p.count] = state_new(e, 0);
        p.gradient[p.count] = state_new(e, 0);
        if (dsv4_state_copy(p.state[p.count], state, NULL) != DSV4_OK ||
            compress_part(e, &l->s, &r, state, p.from[p.count], p.from[p.count + 1], NULL) != DSV4_OK) {
            fprintf(stderr, "tests: no parts\n");
            exit(1);
        }
    }
    p.gradient[p.count] = NULL;
    dsv4_state_destroy(state);
    results_free(&r);
    return p;
}

SUPPORT void backward_case_parts_free(backward_parts *p) {
    for (int64_t i = 0; i < p->count; i++) {
        dsv4_state_destroy(p->state[i]);
        dsv4_state_destroy(p->gradient[i]);
    }
    free(p->from);
    free(p->state);
    free(p->gradient);
    memset(p, 0, sizeof *p);
}

/* One part's backward call, into whatever `to` names. */
SUPPORT dsv4_status backward_part(const backward_case *l, const engine *e, const backward_parts *p, int64_t i,
                                  dsv4_gradients to, dsv4_state *previous) {
    const int64_t from = p->from[i], entry = dsv4_state_tokens(p->state[i]) / l->config.ratio;
    dsv4_segment part = segment_new(from, p->from[i + 1] - from, l->s.position + from, entry, p->state[i]);
    dsv4_segment_gradient carried = {p->gradient[i + 1], previous};
    dsv4_batch b = backward_case_batch(l, &part, 1);
    to.segments = &carried;
    return dsv4_backward(e->compressor, &b, &to, e->workspace, NULL);
}

/* Every gradient, part by part: from the last one back for dx and what is carried, then from the first for the sums. */
SUPPORT dsv4_status backward_cut(const backward_case *l, const engine *e, const int64_t *lengths, int length_count,
                                 const gradient_set *g) {
    backward_parts p = backward_case_cut(l, e, lengths, length_count);
    dsv4_gradients rows = gradients_into(g, l->dout, l->dout_dtype), sums = rows;
    dsv4_matrix *const sum[] = {&rows.dwkv, &rows.dwgate, &rows.dape, &rows.dnorm};
    dsv4_status status = DSV4_OK;
    for (int i = 0; i < 4; i++) sum[i]->data = NULL;
    sums.dx.data = NULL;
    for (int64_t i = p.count - 1; i >= 0 && status == DSV4_OK; i--)
        status = backward_part(l, e, &p, i, rows, p.gradient[i]);
    for (int64_t i = 0; i < p.count && status == DSV4_OK; i++) {
        sums.accumulate = i > 0;
        status = backward_part(l, e, &p, i, sums, NULL);
    }
    backward_case_parts_free(&p);
    return status;
}

/* ---- Beside the oracle ------------------------------------------------------------------------------------- */

/* The backward_case in double precision, to be freed. */
typedef struct oracle_task {
    oracle_config config;
    oracle_params params;
    oracle_backward_call backward_case;
} oracle_task;

SUPPORT int backward_case_narrow(const backward_case *l) {
    const dsv4_params *p = &l->m.params;
    const int wide = p->wkv.dtype == DSV4_F32 || (p->wgate.data && p->wgate.dtype == DSV4_F32);
    return l->s.dtype == DSV4_BF16 && (!wide || (l->config.rounding & DSV4_ROUND_PARAMS));
}

SUPPORT oracle_task oracle_task_of(const backward_case *l) {
    oracle_task t = {oracle_config_of(&l->config), oracle_params_of(&l->m), {0}};
    t.backward_case.x = doubles(l->s.x, l->s.dtype, l->s.tokens * l->config.hidden_dim);
    t.backward_case.dout = doubles(l->dout, l->dout_dtype, l->entries * l->config.head_dim);
    t.backward_case.tokens = l->s.tokens;
    t.backward_case.entries = l->entries;
    t.backward_case.start = l->s.position;
    t.backward_case.narrow = backward_case_narrow(l);
    return t;
}

SUPPORT void oracle_task_free(oracle_task *t) {
    free((void *)(uintptr_t)t->backward_case.x);
    free((void *)(uintptr_t)t->backward_case.dout);
    oracle_params_free(&t->params);
}

/* The oracle's gradients from the measured stages of the forward pass, so that what was rounded there is known. */
SUPPORT oracle_gradients oracle_gradients_of(const backward_case *l) {
    oracle_task t = oracle_task_of(l);
    results r = results_new(&l->config, DSV4_F32, l->s.tokens, l->entries);
    memset(r.stage[STAGE_KV], 0, r.bytes[STAGE_KV]); /* the tail's rows are not written */
    memset(r.stage[STAGE_GATE], 0, r.bytes[STAGE_GATE]);
    if (compress_whole(&l->e, &l->s, &r, NULL) != DSV4_OK) exit(1);
    oracle_stages measured = {0};
    measured.kv = result_doubles(&r, STAGE_KV);
    measured.gate = result_doubles(&r, STAGE_GATE);
    measured.weights = result_doubles(&r, STAGE_WEIGHTS);
    measured.pooled = result_doubles(&r, STAGE_POOLED);
    oracle_gradients g = oracle_backward(&t.config, &t.params, &t.backward_case, &measured);
    oracle_stages_free(&measured);
    results_free(&r);
    oracle_task_free(&t);
    return g;
}

SUPPORT double largest_of(const double *values, int64_t count) {
    double largest = 0;
    for (int64_t i = 0; i < count; i++) largest = fmax(largest, fabs(values[i]));
    return largest;
}

/* How far a gradient strays, beyond its slack, as a share of the tensor's largest magnitude. */
SUPPORT double gradient_stray(const gradient_set *got, const oracle_gradients *expected, int which) {
    const double largest = largest_of(expected->value[which], expected->count[which]);
    double most = 0;
    for (int64_t i = 0; i < expected->count[which]; i++) {
        const double value = number(got->data[which], got->dtype, i), slack = expected->slack[which][i];
        if (isnan(value)) return INFINITY;
        most = fmax(most, fabs(value - expected->value[which][i]) - slack);
    }
    return most > 0 ? most / largest : 0;
}

#endif /* TESTS_GRADIENT_SUPPORT_H */
