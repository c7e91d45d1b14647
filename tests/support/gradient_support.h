/* gradient_support.h - what tests of the backward pass share: the gradients of a workbench through cuts, or by the
 * oracle. */

#ifndef TESTS_GRADIENT_SUPPORT_H
#define TESTS_GRADIENT_SUPPORT_H

#include "oracle_support.h"
#include "workbench.h"

/* ---- In parts ---------------------------------------------------------------------------------------------- */

/* A sequence cut into parts: the state before each, and the gradient of each state. */
typedef struct backward_parts {
    int64_t count;
    int64_t *from;         /* [count + 1] */
    dsv4_state **state;    /* [count] */
    dsv4_state **gradient; /* [count + 1]; of the last: NULL */
} backward_parts;

/* The forward pass through a state, `lengths` (over and over) tokens at a time; the states before each part stay. */
SUPPORT backward_parts backward_parts_of(const workbench *w, const engine *e, const int64_t *lengths,
                                         int length_count) {
    backward_parts p = {0};
    results r = results_new(&w->config, DSV4_F32, w->s.tokens, w->entries);
    dsv4_state *state = state_new(e, 0);
    p.from = reserve((size_t)(w->s.tokens + 1) * sizeof *p.from);
    p.state = reserve((size_t)(w->s.tokens + 1) * sizeof *p.state);
    p.gradient = reserve((size_t)(w->s.tokens + 1) * sizeof *p.gradient);
    p.from[0] = 0;
    for (; p.from[p.count] < w->s.tokens; p.count++) {
        p.from[p.count + 1] = least(p.from[p.count] + lengths[p.count % length_count], w->s.tokens);
        p.state[p.count] = state_new(e, 0);
        p.gradient[p.count] = state_new(e, 0);
        if (dsv4_state_copy(p.state[p.count], state, NULL) != DSV4_OK ||
            compress_part(e, &w->s, &r, state, p.from[p.count], p.from[p.count + 1], NULL) != DSV4_OK) {
            fprintf(stderr, "tests: no parts\n");
            exit(1);
        }
    }
    p.gradient[p.count] = NULL;
    dsv4_state_destroy(state);
    results_free(&r);
    return p;
}

SUPPORT void backward_parts_free(backward_parts *p) {
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
SUPPORT dsv4_status backward_part(const workbench *w, const engine *e, const backward_parts *p, int64_t i,
                                  dsv4_gradients to, dsv4_state *previous) {
    const int64_t from = p->from[i], entry = dsv4_state_tokens(p->state[i]) / w->config.ratio;
    dsv4_segment part = segment_new(from, p->from[i + 1] - from, w->s.position + from, entry, p->state[i]);
    dsv4_segment_gradient carried = {p->gradient[i + 1], previous};
    dsv4_batch b = backward_batch(w, &part, 1);
    to.segments = &carried;
    return dsv4_backward(e->compressor, &b, &to, e->workspace, NULL);
}

/* Every gradient, part by part: from the last one back for dx and what is carried, then from the first for the sums. */
SUPPORT dsv4_status backward_cut(const workbench *w, const engine *e, const int64_t *lengths, int length_count,
                                 const gradient_set *g) {
    backward_parts p = backward_parts_of(w, e, lengths, length_count);
    dsv4_gradients rows = gradients_into(g, w->dout, w->out_dtype), sums = rows;
    dsv4_status status = DSV4_OK;
    for (int i = ORACLE_DWKV; i < GRADIENTS; i++) gradient_target(&rows, i)->data = NULL;
    sums.dx.data = NULL;
    for (int64_t i = p.count - 1; i >= 0 && status == DSV4_OK; i--)
        status = backward_part(w, e, &p, i, rows, p.gradient[i]);
    for (int64_t i = 0; i < p.count && status == DSV4_OK; i++) {
        sums.accumulate = i > 0;
        status = backward_part(w, e, &p, i, sums, NULL);
    }
    backward_parts_free(&p);
    return status;
}

/* ---- Beside the oracle ------------------------------------------------------------------------------------- */

/* The workbench in double precision. */
typedef struct oracle_task {
    oracle_config config;
    oracle_params params;
    oracle_backward_call call;
} oracle_task;

SUPPORT int rounds_to_bf16(const workbench *w) {
    const dsv4_params *p = &w->m.params;
    const int wide = p->wkv.dtype == DSV4_F32 || (p->wgate.data && p->wgate.dtype == DSV4_F32);
    return w->s.dtype == DSV4_BF16 && (!wide || (w->config.rounding & DSV4_ROUND_PARAMS));
}

SUPPORT oracle_task oracle_task_of(workbench *w) {
    const double *x = keep(w, doubles(w->s.x, w->s.dtype, w->s.tokens * w->config.hidden_dim));
    const double *dout = keep(w, doubles(w->dout, w->out_dtype, w->entries * w->config.head_dim));
    oracle_task t = {oracle_config_of(&w->config), oracle_params_of(&w->m), {0}};
    const double *const params[] = {t.params.wkv, t.params.wgate, t.params.ape, t.params.norm};
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) keep(w, (void *)(uintptr_t)params[i]);
    t.call = (oracle_backward_call){x, dout, w->s.tokens, w->entries, w->s.position, rounds_to_bf16(w)};
    return t;
}

/* The oracle's gradients from the measured stages of the forward pass, so that what was rounded there is known. */
SUPPORT oracle_gradients oracle_gradients_of(workbench *w) {
    oracle_task t = oracle_task_of(w);
    results r = workbench_results_in(w, DSV4_F32);
    memset(r.stage[STAGE_KV], 0, r.bytes[STAGE_KV]); /* the tail's rows are not written */
    memset(r.stage[STAGE_GATE], 0, r.bytes[STAGE_GATE]);
    if (compress_whole(&w->e, &w->s, &r, NULL) != DSV4_OK) exit(1);
    oracle_stages measured = {0};
    measured.kv = result_doubles(&r, STAGE_KV);
    measured.gate = result_doubles(&r, STAGE_GATE);
    measured.weights = result_doubles(&r, STAGE_WEIGHTS);
    measured.pooled = result_doubles(&r, STAGE_POOLED);
    oracle_gradients g = oracle_backward(&t.config, &t.params, &t.call, &measured);
    oracle_stages_free(&measured);
    for (int i = 0; i < GRADIENTS; i++) {
        keep(w, g.value[i]);
        keep(w, g.slack[i]);
    }
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
