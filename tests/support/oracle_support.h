/* oracle_support.h - from the header's types to the oracle's, and whether a result lies where an honest fp32
 * computation may end. */

#ifndef TESTS_ORACLE_SUPPORT_H
#define TESTS_ORACLE_SUPPORT_H

#include "oracle.h"
#include "support.h"

SUPPORT double or_default(double value, double otherwise) { return value == 0 ? otherwise : value; }

SUPPORT oracle_config oracle_config_of(const dsv4_config *c) {
    oracle_config o = {0};
    o.hidden_dim = c->hidden_dim;
    o.head_dim = c->head_dim;
    o.ratio = c->ratio;
    o.rope_dim = c->rope_dim;
    o.overlap = c->overlap;
    o.no_ape = c->no_ape;
    o.no_gate = c->no_gate;
    o.rounding = c->rounding;
    o.eps = or_default((double)c->eps, (double)1e-6f);
    o.pad_gate = or_default((double)c->pad_gate, -INFINITY);
    o.rope_theta = or_default(c->rope_theta, 160000);
    o.yarn_factor = or_default(c->yarn_factor, 1);
    o.yarn_orig_ctx = or_default(c->yarn_orig_ctx, 65536);
    o.yarn_beta_fast = or_default(c->yarn_beta_fast, 32);
    o.yarn_beta_slow = or_default(c->yarn_beta_slow, 1);
    return o;
}

/* An array as doubles, to be freed. */
SUPPORT double *doubles(const void *data, dsv4_dtype dtype, int64_t count) {
    double *d = oracle_array(count);
    for (int64_t i = 0; i < count; i++) d[i] = number(data, dtype, i);
    return d;
}

/* One parameter; empty where the configuration has none. Rounding point `params`: of all but ape. */
SUPPORT double *oracle_param(const model *m, dsv4_const_matrix array, dsv4_param param) {
    const int64_t count = m->info[param].count;
    double *d = doubles(array.data, array.dtype, count);
    for (int64_t i = 0; i < count && (m->config.rounding & DSV4_ROUND_PARAMS) && param != DSV4_APE; i++)
        d[i] = oracle_bf16(d[i]);
    return d;
}

SUPPORT oracle_params oracle_params_of(const model *m) {
    const dsv4_params *p = &m->params;
    oracle_params o = {oracle_param(m, p->wkv, DSV4_WKV), oracle_param(m, p->wgate, DSV4_WGATE),
                       oracle_param(m, p->ape, DSV4_APE), oracle_param(m, p->norm, DSV4_NORM)};
    return o;
}

SUPPORT void oracle_params_free(oracle_params *p) {
    free((void *)(uintptr_t)p->wkv);
    free((void *)(uintptr_t)p->wgate);
    free((void *)(uintptr_t)p->ape);
    free((void *)(uintptr_t)p->norm);
    memset(p, 0, sizeof *p);
}

SUPPORT double *result_doubles(const results *r, int stage) {
    double *d = oracle_array(r->count[stage]);
    for (int64_t i = 0; i < r->count[stage]; i++) d[i] = result(r, stage, i);
    return d;
}

/* The stages of a whole sequence, each computed by the oracle from the measured stage before it (x for the first). */
SUPPORT oracle_stages oracle_follow(const oracle_config *c, const oracle_params *p, const sequence *s,
                                    const results *r) {
    oracle_stages o = oracle_stages_new(c, s->tokens);
    double *x = doubles(s->x, s->dtype, s->tokens * c->hidden_dim);
    double *kv = result_doubles(r, STAGE_KV), *gate = result_doubles(r, STAGE_GATE);
    double *pooled = result_doubles(r, STAGE_POOLED), *latent = result_doubles(r, STAGE_LATENT);
    oracle_project(c, p->wkv, x, s->tokens, o.kv);
    if (!c->no_gate) oracle_project(c, p->wgate, x, s->tokens, o.gate);
    oracle_pool(c, p, kv, gate, o.entries, o.weights, o.pooled);
    oracle_norm(c, p, pooled, o.entries, o.latent);
    oracle_rope(c, latent, o.entries, s->position, o.out);
    free(x);
    free(kv);
    free(gate);
    free(pooled);
    free(latent);
    return o;
}

SUPPORT const double *oracle_stage(const oracle_stages *o, int stage) {
    const double *const stages[STAGE_COUNT] = {o->kv, o->gate, o->weights, o->pooled, o->latent, o->out};
    return stages[stage];
}

/* Where a result lies outside of what fp32 arithmetic may give; `stage` is STAGE_COUNT where none does. */
typedef struct stray_number {
    int stage;
    int64_t index;
    double least, got, greatest;
} stray_number;

/* Holds every stage of `r` (of fp32 outputs, a whole sequence's) against the oracle, erring `lean` times as far as its
 * bounds. These hold for a few thousand sums; among millions, some of a hundred terms stray further. */
SUPPORT stray_number oracle_judge_leaning(const model *m, const sequence *s, const results *r, int lean) {
    oracle_config c = oracle_config_of(&m->config);
    oracle_params p = oracle_params_of(m);
    c.lean = -lean;
    oracle_stages low = oracle_follow(&c, &p, s, r);
    c.lean = lean;
    oracle_stages high = oracle_follow(&c, &p, s, r);
    stray_number verdict = {STAGE_COUNT, 0, 0, 0, 0};
    for (int i = 0; i < STAGE_COUNT && verdict.stage == STAGE_COUNT; i++) {
        for (int64_t k = 0; k < r->count[i]; k++) {
            double least = oracle_stage(&low, i)[k], greatest = oracle_stage(&high, i)[k], got = result(r, i, k);
            if (least <= got && got <= greatest) continue;
            verdict = (stray_number){i, k, least, got, greatest};
            break;
        }
    }
    oracle_stages_free(&low);
    oracle_stages_free(&high);
    oracle_params_free(&p);
    return verdict;
}

SUPPORT stray_number oracle_judge(const model *m, const sequence *s, const results *r) {
    return oracle_judge_leaning(m, s, r, 1);
}

#endif /* TESTS_ORACLE_SUPPORT_H */
