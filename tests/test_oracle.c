/* Random configurations, odd sizes above all, against the oracle's formulas: every stage of every preset must lie where
 * an honest fp32 computation may end. */

#include "runner.h"
#include "oracle_support.h"
#include "workbench.h"

/* ---- Random configurations --------------------------------------------------------------------------------- */

enum { PLAIN_CASES = 48 }; /* of each preset */

typedef struct trial {
    dsv4_config config;
    dsv4_dtype params[DSV4_PARAM_COUNT], x;
    int64_t tokens, position;
} trial;

static int64_t one_of(dice *d, const int64_t *values, int count) { return values[dice_below(d, count)]; }

static trial random_trial(uint64_t seed, uint32_t rounding) {
    static const int64_t hidden_dims[] = {1, 2, 3, 15, 31, 33, 64, 100, 127, 255, 256, 257, 300, 511, 513, 700};
    static const int64_t ratios[] = {1, 2, 3, 4, 5, 7, 8, 13, 32};
    static const int64_t positions[] = {0, 1, 127, 65535, 1048575, 16777217};
    dice d = {seed * 1000003};
    trial t = {0};
    dsv4_config *c = &t.config;
    c->hidden_dim = one_of(&d, hidden_dims, 16);
    c->head_dim = 1 + dice_below(&d, 70);
    c->ratio = one_of(&d, ratios, 9);
    c->rope_dim = dice_below(&d, 4) ? 2 * dice_below(&d, c->head_dim / 2 + 1) : 0;
    c->overlap = (int)dice_below(&d, 2);
    c->no_ape = dice_below(&d, 4) == 0;
    c->no_gate = c->ratio == 1 && !c->overlap && dice_below(&d, 2);
    c->rounding = rounding;
    c->eps = dice_below(&d, 2) ? 0 : 1e-3f;
    c->pad_gate = dice_below(&d, 3) ? 0 : -1e4f;
    c->rope_theta = dice_below(&d, 2) ? 0 : 10000;
    if (dice_below(&d, 2)) {
        c->yarn_factor = (double)(2 + dice_below(&d, 40));
        c->yarn_orig_ctx = dice_below(&d, 2) ? 0 : 4096;
    }
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) t.params[i] = dice_below(&d, 2) ? DSV4_BF16 : DSV4_F32;
    t.x = dice_below(&d, 2) ? DSV4_BF16 : DSV4_F32;
    t.tokens = c->ratio * (1 + dice_below(&d, 5));
    t.position = one_of(&d, positions, 6);
    c->sums = dice_below(&d, 2) ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
    return t;
}

static const char *describe(const trial *t) {
    static char text[256];
    const dsv4_config *c = &t->config;
    snprintf(text, sizeof text,
             "H %d D %d m %d R %d overlap %d no_ape %d no_gate %d rounding %#x sums %d yarn %g tokens %d at %d x %s w "
             "%s %s %s %s",
             (int)c->hidden_dim, (int)c->head_dim, (int)c->ratio, (int)c->rope_dim, c->overlap, c->no_ape, c->no_gate,
             (unsigned)c->rounding, (int)c->sums, c->yarn_factor, (int)t->tokens, (int)t->position, dtype_name(t->x),
             dtype_name(t->params[0]), dtype_name(t->params[1]), dtype_name(t->params[2]), dtype_name(t->params[3]));
    return text;
}

/* Outputs in bf16 are the fp32 ones, rounded. */
static int is_rounded(const results *narrow, const results *wide) {
    for (int stage = STAGE_LATENT; stage <= STAGE_OUT; stage++)
        for (int64_t i = 0; i < wide->count[stage]; i++)
            if (result(narrow, stage, i) != oracle_bf16(result(wide, stage, i))) return 0;
    return 1;
}

static const char *isa_in_turn(uint64_t i) { return dsv4_isa_name((int)(i % (uint64_t)isa_count())); }

TEST agrees_with_the_oracle(uint64_t seed, uint32_t rounding) {
    trial t = random_trial(seed, rounding);
    sequence s = sequence_new(&t.config, t.x, t.tokens, seed + 77);
    workbench w = workbench_with(model_new(&t.config, t.params, seed), s, DSV4_F32);
    results wide = workbench_results_in(&w, DSV4_F32), narrow = workbench_results_in(&w, DSV4_BF16);
    dsv4_error error = {0};

    w.s.position = t.position;
    w.e = workbench_engine(&w, isa_in_turn(seed), NULL);
    ASSERTm(note("%s: %s", describe(&t), error.text), compress_whole(&w.e, &w.s, &wide, &error) == DSV4_OK);
    ASSERTm(note("%s: %s", describe(&t), error.text), compress_whole(&w.e, &w.s, &narrow, &error) == DSV4_OK);
    stray_number v = oracle_judge(&w.m, &w.s, &wide);
    ASSERTm(note("%s: %s[%d] is %.9g, not in [%.9g, %.9g] (%s)", describe(&t), stage_name(v.stage), (int)v.index, v.got,
                 v.least, v.greatest, isa_in_turn(seed)),
            v.stage == STAGE_COUNT);
    ASSERTm(note("%s: bf16 output is not the rounded fp32 one", describe(&t)), is_rounded(&narrow, &wide));
    workbench_free(&w);
    PASS();
}

/* ---- Accuracy ---------------------------------------------------------------------------------------------- */

/* sqrt(sum (got - exact)^2 / sum exact^2) */
static double relative_rms(const results *r, int stage, const double *exact) {
    double errors = 0, sizes = 0;
    for (int64_t i = 0; i < r->count[stage]; i++) {
        double error = result(r, stage, i) - exact[i];
        errors += error * error;
        sizes += exact[i] * exact[i];
    }
    return sqrt(errors / sizes);
}

/* Blocks of 128 terms err by 2.3e-7, of 256 by 3.0e-7, one unbroken chain of additions by 1.2e-6. */
TEST fp32_projections_at_hidden_dim_4096_are_accurate(void) {
    const dsv4_config c = {.hidden_dim = 4096, .head_dim = 48, .ratio = 4, .rope_dim = 16, .overlap = 1};
    workbench w = workbench_for(&c, DSV4_F32, 16, 5);
    results r = workbench_results(&w);
    oracle_config oc = oracle_config_of(&c);
    oracle_params op = oracle_params_of(&w.m);
    oracle_stages o = oracle_stages_new(&oc, w.s.tokens);
    double *x = keep(&w, doubles(w.s.x, w.s.dtype, w.s.tokens * c.hidden_dim));

    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, NULL));
    oracle_forward(&oc, &op, x, 0, &o);
    for (int stage = STAGE_KV; stage <= STAGE_GATE; stage++) {
        double rms = relative_rms(&r, stage, oracle_stage(&o, stage));
        ASSERTm(note("%s errs by %.3g", stage_name(stage), rms), rms <= 2.5e-7);
    }
    double rms = relative_rms(&r, STAGE_OUT, o.out);
    ASSERTm(note("out errs by %.3g", rms), rms <= 6e-7);

    oracle_stages_free(&o);
    oracle_params_free(&op);
    workbench_free(&w);
    PASS();
}

/* ---- Where formulas have corners --------------------------------------------------------------------------- */

TEST equal_scores_are_averaged(void) {
    window_case w = {{1, 2, 3, 6}, {7, 7, 7, 7}, 0};
    float weights[4] = {0}, pooled = 0;
    ASSERT_EQ(DSV4_OK, pool_window(&w, NULL, 0, 0, weights, &pooled));
    for (int j = 0; j < 4; j++) ASSERT_EQ_FMT(0.25, (double)weights[j], "%g");
    ASSERT_EQ_FMT(3.0, (double)pooled, "%g");
    PASS();
}

TEST a_far_higher_score_takes_all(void) {
    window_case w = {{1, 2, 3, 6}, {-200, 300, -1e30f, -INFINITY}, 0};
    float weights[4] = {0}, pooled = 0;
    ASSERT_EQ(DSV4_OK, pool_window(&w, NULL, 0, 0, weights, &pooled));
    for (int j = 0; j < 4; j++) ASSERT_EQ_FMT(j == 1 ? 1.0 : 0.0, (double)weights[j], "%g");
    ASSERT_EQ_FMT(2.0, (double)pooled, "%g");
    PASS();
}

/* The least normal number of fp32 is e^-87.3365. */
TEST a_weight_that_would_be_subnormal_is_nought(void) {
    window_case w = {{1, 2, 3, 6}, {0, -87.33f, -87.34f, -87.4f}, 0};
    float weights[4] = {0}, pooled = 0;
    ASSERT_EQ(DSV4_OK, pool_window(&w, NULL, 0, 0, weights, &pooled));
    ASSERT_EQ_FMT(1.0, (double)weights[0], "%g");
    ASSERT_IN_RANGE(exp(-87.33), (double)weights[1], 1e-43);
    for (int j = 2; j < 4; j++) ASSERT_EQ_FMT(0.0, (double)weights[j], "%g");
    PASS();
}

TEST the_largest_scores_do_not_overflow(void) {
    window_case w = {{1, 2, 3, 6}, {3e38f, 3e38f, -3e38f, 3e38f}, 0};
    float weights[4] = {0}, pooled = 0;
    ASSERT_EQ(DSV4_OK, pool_window(&w, NULL, 0, 0, weights, &pooled));
    ASSERT_EQ_FMT(3.0, (double)pooled, "%g");
    PASS();
}

/* With rounded weights three equal rows weigh bf16(1/3) = 0.333984375 each, and each product is rounded too. */
TEST maxtext_rounds_each_weight_and_each_product(void) {
    window_case w = {{1, 1.0078125f, 3, 0}, {5, 5, 5, -INFINITY}, DSV4_ROUNDING_MAXTEXT};
    float weights[4] = {0}, pooled = 0;
    double third = 0.333984375;
    ASSERT_EQ(DSV4_OK, pool_window(&w, NULL, 0, 0, weights, &pooled));
    for (int j = 0; j < 3; j++) ASSERT_EQ_FMT(third, (double)weights[j], "%.9g");
    double sum = third + oracle_bf16(third * 1.0078125) + oracle_bf16(third * 3);
    ASSERT_EQ_FMT(oracle_bf16(sum), (double)pooled, "%.9g");
    PASS();
}

SUITE(oracle) {
    for (int p = 0; p < ROUNDING_COUNT; p++) {
        for (uint64_t i = 0; i < PLAIN_CASES; i++) {
            RUN_NAMED(note("%s_%d", roundings[p].name, (int)i), agrees_with_the_oracle, i + 1000 * (uint64_t)p,
                      roundings[p].bits);
        }
    }
    for (uint64_t i = 0; i < PLAIN_CASES; i++) { /* points by their own names, in any combination */
        dice d = {i};
        uint32_t rounding = i < ROUNDING_POINTS ? 1u << i : (uint32_t)dice_below(&d, 1 << ROUNDING_POINTS);
        RUN_NAMED(note("rounding_%#x", (unsigned)rounding), agrees_with_the_oracle, 9000 + i, rounding);
    }
    RUN_TEST(fp32_projections_at_hidden_dim_4096_are_accurate);
    RUN_TEST(equal_scores_are_averaged);
    RUN_TEST(a_far_higher_score_takes_all);
    RUN_TEST(a_weight_that_would_be_subnormal_is_nought);
    RUN_TEST(the_largest_scores_do_not_overflow);
    RUN_TEST(maxtext_rounds_each_weight_and_each_product);
}

TESTS_MAIN(oracle);
