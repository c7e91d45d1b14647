/* At the edges: arrays that end where memory ends, numbers that are none, the longest streams, the oddest sizes. */

#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#define _POSIX_C_SOURCE 200809L

#include <float.h>

#include "fences.h"
#include "gradient_support.h"
#include "runner.h"

/* ---- Guard pages ------------------------------------------------------------------------------------------- */

/* Moves an array that malloc gave into fenced memory; what it leaves is to be freed. */
static void fence(fenced *f, void **array, size_t bytes) {
    *f = fenced_copy(*array, bytes);
    free(*array);
    *array = f->data;
}

/* Every width from one vector to three, every mix of types: parameters, tokens and results end at a guard page. */
TEST nothing_is_read_or_written_past_the_end(const char *isa, int narrow) {
    for (int tail = 0; tail <= 34; tail++) {
        shape of = tail_shape(tail, 2, (17 + tail) / 2 * 2, DSV4_F32, DSV4_F32);
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) of.param[i] = (narrow + tail) % 3 ? DSV4_BF16 : DSV4_F32;
        of.x = narrow ? DSV4_BF16 : DSV4_F32;
        of.out = narrow ? DSV4_BF16 : DSV4_F32;
        dsv4_config config = shape_config(&of);
        model m = shape_model(&of, 1);
        sequence s = shape_sequence(&of, 10, 2);
        results plain = results_new(&config, of.out, 10, 5), r = results_new(&config, of.out, 10, 5);
        engine e = engine_new(&m, isa, NULL);
        ASSERT_EQ(DSV4_OK, compress_whole(&e, &s, &plain, NULL));
        engine_free(&e);

        fenced params[DSV4_PARAM_COUNT], stages[STAGE_COUNT], x;
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
            fence(&params[i], &m.data[i], (size_t)m.info[i].count * dsv4_dtype_size(of.param[i]));
            model_array(&m.params, i)->data = m.data[i];
        }
        fence(&x, &s.x, (size_t)(10 * config.hidden_dim) * dsv4_dtype_size(of.x));
        for (int i = 0; i < STAGE_COUNT; i++) fence(&stages[i], &r.stage[i], r.bytes[i]);
        e = engine_new(&m, isa, NULL);
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) fenced_free(&params[i]); /* not needed any more */
        static const int64_t one_call[] = {10}, calls[] = {3};
        ASSERT_EQ(DSV4_OK, compress_cut(&e, &s, &r, one_call, 1, NULL));
        ASSERT_EQ(STAGE_COUNT, results_difference(&plain, &r));
        ASSERT_EQ(DSV4_OK, compress_cut(&e, &s, &r, calls, 1, NULL));
        ASSERT_EQ(STAGE_COUNT, results_difference(&plain, &r));
        engine_free(&e);

        for (int i = 0; i < STAGE_COUNT; i++) fenced_free(&stages[i]);
        fenced_free(&x);
        free(r.no_weights);
        results_free(&plain);
    }
    PASS();
}

typedef struct fences {
    fenced all[DSV4_PARAM_COUNT + GRADIENTS + 4];
    int count;
} fences;

static void fence_one(fences *f, void **array, size_t bytes) { fence(&f->all[f->count++], array, bytes); }

/* Everything that a backward call is given; `r` for its kv and gate. */
static fences fence_case(backward_case *l, gradient_set *g, results *r) {
    fences f = {0};
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        dsv4_const_matrix *param = model_array(&l->m.params, i);
        fence_one(&f, &l->m.data[i], (size_t)l->m.info[i].count * dsv4_dtype_size(param->dtype));
        param->data = l->m.data[i];
    }
    for (int i = 0; i < GRADIENTS; i++) fence_one(&f, &g->data[i], g->bytes[i]);
    fence_one(&f, &l->s.x, (size_t)(l->s.tokens * l->config.hidden_dim) * dsv4_dtype_size(l->s.dtype));
    fence_one(&f, &l->dout, (size_t)(l->entries * l->config.head_dim) * dsv4_dtype_size(l->dout_dtype));
    fence_one(&f, &r->stage[STAGE_KV], r->bytes[STAGE_KV]);
    fence_one(&f, &r->stage[STAGE_GATE], r->bytes[STAGE_GATE]);
    return f;
}

/* Frees what is in fenced memory, and then the rest. */
static void fenced_case_free(fences *f, backward_case *l, gradient_set *g, results *r) {
    for (int i = 0; i < f->count; i++) fenced_free(&f->all[i]);
    memset(l->m.data, 0, sizeof l->m.data);
    memset(g->data, 0, sizeof g->data);
    l->s.x = l->dout = r->stage[STAGE_KV] = r->stage[STAGE_GATE] = NULL;
    results_free(r);
    backward_case_free(l);
}

/* The same on the way back: recomputing, and from the forward pass's rows. */
TEST gradients_do_not_pass_the_end(const char *isa, int narrow) {
    for (int tail = 0; tail <= 34; tail++) {
        const dsv4_dtype dtype = narrow ? DSV4_BF16 : DSV4_F32;
        shape of = tail_shape(tail, 1 + tail % 3, 2, dtype, dtype);
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) of.param[i] = (narrow + tail) % 3 ? DSV4_BF16 : DSV4_F32;
        backward_case l = backward_case_of(&of, 11, 1);
        results r = results_new(&l.config, DSV4_F32, l.s.tokens, l.entries);
        gradient_set plain = gradient_set_new(&l.config, dtype, l.s.tokens);
        gradient_set g = gradient_set_new(&l.config, dtype, l.s.tokens);
        ASSERT_EQ(DSV4_OK, compress_whole(&l.e, &l.s, &r, NULL));
        ASSERT_EQ(DSV4_OK, backward_whole(&l, &l.e, &plain));

        fences f = fence_case(&l, &g, &r);
        engine e = trainer_new(&l.m, isa, NULL);
        dsv4_segment whole = segment_new(0, l.s.tokens, l.s.position, 0, NULL);
        dsv4_batch b = backward_case_batch(&l, &whole, 1);
        dsv4_gradients to = gradients_into(&g, l.dout, dtype);
        for (int given = 0; given <= 1; given++) {
            b.kv = given ? r.stage[STAGE_KV] : NULL;
            b.gate = given ? r.stage[STAGE_GATE] : NULL;
            ASSERT_EQ(DSV4_OK, dsv4_backward(e.compressor, &b, &to, e.workspace, NULL));
            ASSERT_STR_EQ("no gradient", gradient_name(gradient_difference(&plain, &g, 0)));
        }
        engine_free(&e);
        gradient_set_free(&plain);
        fenced_case_free(&f, &l, &g, &r);
    }
    PASS();
}

TEST conversions_do_not_pass_the_end(void) {
    for (size_t count = 0; count <= 70; count++) {
        fenced wide = fenced_new(count * 4), narrow = fenced_new(count * 2);
        memset(wide.data, 0x3F, count * 4);
        dsv4_bf16_from_f32_array(narrow.data, wide.data, count);
        dsv4_bf16_to_f32_array(wide.data, narrow.data, count);
        fenced_free(&narrow);
        fenced_free(&wide);
    }
    PASS();
}

/* A saved state, read and written to its last byte. */
TEST saved_states_do_not_pass_the_end(void) {
    workbench w = workbench_new(&shapes[4], 4, 3);
    results r = workbench_results(&w);
    dsv4_state *state = state_new(&w.e, 2), *other = state_new(&w.e, 1);
    for (int64_t t = 0; t < w.s.tokens; t++) {
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, t, t + 1, NULL));
        size_t size = dsv4_state_save_size(state);
        fenced bytes = fenced_new(size);
        ASSERT_EQ(DSV4_OK, dsv4_state_save(state, bytes.data, size, NULL, NULL));
        ASSERT_EQ(DSV4_OK, dsv4_state_restore(other, bytes.data, size, NULL));
        fenced_free(&bytes);
    }
    dsv4_state_destroy(other);
    dsv4_state_destroy(state);
    results_free(&r);
    workbench_free(&w);
    PASS();
}

/* ---- Numbers that are none, and the largest ------------------------------------------------------------------ */

static const struct {
    const char *name;
    uint32_t bits;
} specials[] = {
    {"nan", 0x7FC00000},     {"negative_nan", 0xFFC10000}, {"infinity", 0x7F800000},  {"minus_infinity", 0xFF800000},
    {"largest", 0x7F7F0000}, {"lowest", 0xFF7F0000},       {"subnormal", 0x00010000}, {"minus_zero", 0x80000000}};
enum { SPECIAL_COUNT = sizeof specials / sizeof *specials };

/* Equal bits, or both NaN: payloads are nobody's promise. */
static int same_number(const results *a, const results *b, int stage, int64_t i) {
    double x = result(a, stage, i), y = result(b, stage, i);
    return (isnan(x) && isnan(y)) || (x == y && signbit(x) == signbit(y));
}

/* A special number in one token reaches the windows that pool the token, and no others. */
TEST a_special_token_touches_its_own_windows_alone(const shape *of, int special) {
    enum { WINDOWS = 6 };
    workbench w = workbench_new(of, WINDOWS, 4);
    for (int64_t window = 0; window < WINDOWS; window++) {
        int64_t token = window * w.config.ratio + w.config.ratio / 2, at = token * w.config.hidden_dim;
        float kept = (float)number(w.s.x, w.s.dtype, at);
        results r = workbench_results(&w);
        set_number(w.s.x, w.s.dtype, at, float_of_bits(specials[special].bits));
        ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, NULL));
        set_number(w.s.x, w.s.dtype, at, kept);
        for (int64_t i = 0; i < r.count[STAGE_OUT]; i++) {
            int64_t entry = i / w.config.head_dim;
            int touched = entry == window || (w.config.overlap && entry == window + 1);
            if (!touched) ASSERT(result(&w.whole, STAGE_OUT, i) == result(&r, STAGE_OUT, i));
            if (entry == window && special < 2) ASSERT(isnan(result(&r, STAGE_OUT, i)));
            if (special >= 6) ASSERT(isfinite(result(&r, STAGE_OUT, i)));
        }
        results_free(&r);
    }
    workbench_free(&w);
    PASS();
}

/* A special number anywhere in the parameters: no kernel set crashes, all agree on what is NaN and on every other
 * bit. */
TEST special_parameters_give_one_answer(const shape *of, int special) {
    for (int p = 0; p < DSV4_PARAM_COUNT; p++) {
        workbench w = workbench_new(of, 3, 5);
        const char *isa;
        if (w.m.info[p].count > 0) {
            set_number(w.m.data[p], of->param[p], w.m.info[p].count / 2, float_of_bits(specials[special].bits));
            engine scalar = engine_new(&w.m, "scalar", NULL);
            results expected = workbench_results(&w);
            ASSERT_EQ(DSV4_OK, compress_whole(&scalar, &w.s, &expected, NULL));
            for (int k = 0; (isa = dsv4_isa_name(k)) != NULL && specials[special].bits != 0x00010000; k++) {
                engine e = engine_new(&w.m, isa, NULL);
                results r = workbench_results(&w);
                ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
                for (int stage = 0; stage < STAGE_COUNT; stage++)
                    for (int64_t i = 0; i < r.count[stage]; i++)
                        ASSERTm(note("%s, %s[%d]: %g, not %g", isa, stage_name(stage), (int)i, result(&r, stage, i),
                                     result(&expected, stage, i)),
                                same_number(&expected, &r, stage, i));
                results_free(&r);
                engine_free(&e);
            }
            results_free(&expected);
            engine_free(&scalar);
        }
        workbench_free(&w);
    }
    PASS();
}

/* A NaN in norm makes NaN of its channel, and of the one that RoPE turns with it. */
TEST a_nan_in_norm_stays_in_its_channel(void) {
    workbench w = workbench_new(&shapes[1], 3, 6); /* D 24, R 8 */
    for (int64_t channel = 0; channel < w.config.head_dim; channel++) {
        float *norm = w.m.data[DSV4_NORM], kept = norm[channel];
        norm[channel] = NAN;
        engine e = engine_new(&w.m, NULL, NULL);
        results r = workbench_results(&w);
        ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
        int64_t plain = w.config.head_dim - w.config.rope_dim, partner = channel < plain ? channel : channel ^ 1;
        for (int64_t i = 0; i < r.count[STAGE_OUT]; i++) {
            int64_t at = i % w.config.head_dim;
            if (at == channel || at == partner)
                ASSERT(isnan(result(&r, STAGE_OUT, i)));
            else
                ASSERT(result(&w.whole, STAGE_OUT, i) == result(&r, STAGE_OUT, i));
        }
        norm[channel] = kept;
        results_free(&r);
        engine_free(&e);
    }
    workbench_free(&w);
    PASS();
}

/* ---- Sizes ------------------------------------------------------------------------------------------------- */

TEST the_oddest_sizes_stream_as_they_compress_whole(void) {
    static const int64_t cuts[][3] = {{1000, 1, 3000}, {4095, 2, 4097}, {223, 225, 1}};
    for (int i = 0; i < ODD_SHAPE_COUNT; i++) {
        workbench w = workbench_new(&odd_shapes[i], odd_shapes[i].ratio > 1000 ? 3 : 40, 7);
        for (int k = 0; k < 3; k++) {
            results cut = workbench_results(&w);
            ASSERT_EQ(DSV4_OK, compress_cut(&w.e, &w.s, &cut, cuts[k], 3, NULL));
            int stage = results_difference(&w.whole, &cut);
            ASSERTm(note("%s: %s differs", odd_shapes[i].name, stage_name(stage)), stage == STAGE_COUNT);
            results_free(&cut);
        }
        workbench_free(&w);
    }
    PASS();
}

/* 1,048,576 tokens through one state, a thousand a call. The tokens repeat, so that each entry is known from a short
 * sequence at its position. TESTS_SLOW in the environment: at the head_dim of V4. */
TEST a_stream_of_a_million_tokens_keeps_its_bits(void) {
    enum { TOKENS = 1 << 20, PERIOD = 1000 };
    shape of = tail_shape(1, 4, 16, DSV4_BF16, DSV4_BF16);
    of.hidden_dim = 2;
    of.head_dim = 32;
    of.rounding = DSV4_ROUNDING_DEEPSEEK;
    of.sums = DSV4_SUMS_PAIRS;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) of.param[i] = i == DSV4_APE ? DSV4_F32 : DSV4_BF16;
    if (getenv("TESTS_SLOW")) of.head_dim = 512, of.rope_dim = 64;
    workbench w = workbench_new(&of, PERIOD / 4, 8);
    results chunk = workbench_results(&w), alone = workbench_results(&w);
    dsv4_state *state = state_new(&w.e, depth_for_weights(&w.config));
    size_t row = chunk.bytes[STAGE_OUT] / (size_t)chunk.entries;
    for (int64_t t = 0; t < TOKENS; t += PERIOD) {
        int64_t count = TOKENS - t < PERIOD ? TOKENS - t : PERIOD, probe = t / PERIOD % (count / 4 - 1);
        dsv4_segment part = segment_new(0, count, t, 0, state);
        dsv4_batch b = batch_new(&w.s, &chunk, &part, 1);
        ASSERT_EQ(DSV4_OK, dsv4_compress(w.e.compressor, &b, w.e.workspace, NULL));
        dsv4_segment two = segment_new(4 * probe, 8, t + 4 * probe, 0, NULL); /* window probe + 1, and the one before */
        b = batch_new(&w.s, &alone, &two, 1);
        ASSERT_EQ(DSV4_OK, dsv4_compress(w.e.compressor, &b, w.e.workspace, NULL));
        ASSERT_MEM_EQ((char *)alone.stage[STAGE_OUT] + row, (char *)chunk.stage[STAGE_OUT] + (size_t)(probe + 1) * row,
                      row);
    }
    ASSERT_EQ_FMT((int)TOKENS, (int)dsv4_state_tokens(state), "%d");
    dsv4_state_destroy(state);
    results_free(&alone);
    results_free(&chunk);
    workbench_free(&w);
    PASS();
}

/* ---- Special values in one row of a window ----------------------------------------------------------------- */

/* A window of four rows whose projections are given, disjoint, D 1: in one call, or cut after `cut` rows through a
 * state. */
typedef struct window_case {
    float kv[4], gate[4];
} window_case;

static float pooled_of(const window_case *w, uint32_t rounding, const char *isa, int64_t cut, int64_t depth) {
    static const float one = 1;
    dsv4_config c = {0};
    c.hidden_dim = c.head_dim = 1;
    c.ratio = 4;
    c.no_ape = 1;
    c.rounding = rounding;
    model m = {0};
    m.config = c;
    m.params.wkv.data = m.params.wgate.data = m.params.norm.data = &one;
    m.params.wkv.dtype = m.params.wgate.dtype = m.params.norm.dtype = DSV4_F32;
    engine e = engine_new(&m, isa, NULL);
    dsv4_state *state = cut > 0 ? state_new(&e, depth) : NULL;
    float pooled = -1, out = 0;
    for (int64_t from = 0, to = cut > 0 ? cut : 4; from < 4; from = to, to = 4) {
        dsv4_segment part = segment_new(from, to - from, from, 0, state);
        dsv4_batch b = {0};
        b.kv = w->kv;
        b.gate = w->gate;
        b.tokens = 4;
        b.out.data = &out;
        b.out.dtype = DSV4_F32;
        b.entries = 1;
        b.segments = &part;
        b.segment_count = 1;
        b.stages.pooled = &pooled;
        if (dsv4_compress(e.compressor, &b, e.workspace, NULL) != DSV4_OK) exit(1);
    }
    dsv4_state_destroy(state);
    engine_free(&e);
    return pooled;
}

/* The same, however the window is cut, by every kernel set, folded or with rounded weights. */
static int pools_to(const window_case *w, float expected) {
    static const uint32_t roundings_tried[] = {0, DSV4_ROUND_WEIGHT};
    const char *isa;
    for (int k = 0; (isa = dsv4_isa_name(k)) != NULL; k++)
        for (int r = 0; r < 2; r++)
            for (int64_t cut = 0; cut < 4; cut++)
                for (int64_t depth = 0; depth < 3; depth += 2) {
                    const float got = pooled_of(w, roundings_tried[r], isa, cut, depth);
                    if (isnan(expected) ? !isnan(got) : got != expected) return 0;
                }
    return 1;
}

TEST a_score_of_minus_infinity_weighs_nothing(void) {
    for (int row = 0; row < 4; row++) {
        window_case w = {{2, 2, 2, 2}, {5, 5, 5, 5}};
        w.kv[row] = w.kv[(row + 1) % 4] = 1e30f;
        w.gate[row] = w.gate[(row + 1) % 4] = -INFINITY; /* two rows are left: a half is a bf16 number */
        ASSERTm(note("row %d", row), pools_to(&w, 2));
        for (int k = 0; k < 4; k++) w.gate[k] = k == row ? 3.0f : -INFINITY; /* and all the others */
        w.kv[row] = 7;
        ASSERTm(note("all but row %d", row), pools_to(&w, 7));
    }
    PASS();
}

TEST a_window_of_nothing_but_minus_infinity_has_no_mean(void) {
    const window_case w = {{1, 2, 3, 4}, {-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
    ASSERT(pools_to(&w, NAN));
    PASS();
}

TEST a_nan_poisons_its_window(void) {
    for (int row = 0; row < 4; row++) {
        window_case score = {{1, 2, 3, 4}, {0, 0, 0, 0}}, kv = score;
        score.gate[row] = NAN;
        kv.kv[row] = NAN;
        ASSERTm(note("score of row %d", row), pools_to(&score, NAN));
        ASSERTm(note("kv of row %d", row), pools_to(&kv, NAN));
    }
    PASS();
}

/* As IEEE arithmetic has it: infinite where it weighs something, NaN beside its opposite or at a weight of 0. */
TEST an_infinite_kv_is_infinite(void) {
    for (int row = 0; row < 4; row++) {
        window_case w = {{1, 2, 3, 4}, {0, 0, 0, 0}};
        w.kv[row] = INFINITY;
        ASSERTm(note("row %d", row), pools_to(&w, INFINITY));
        w.kv[row] = -INFINITY;
        ASSERTm(note("row %d", row), pools_to(&w, -INFINITY));
        w.kv[(row + 1) % 4] = INFINITY;
        ASSERTm(note("both, from row %d", row), pools_to(&w, NAN));
        w.kv[(row + 1) % 4] = 1;
        w.gate[row] = -INFINITY;
        ASSERTm(note("masked row %d", row), pools_to(&w, NAN));
    }
    PASS();
}

SUITE(extremes) {
    RUN_TEST(a_score_of_minus_infinity_weighs_nothing);
    RUN_TEST(a_window_of_nothing_but_minus_infinity_has_no_mean);
    RUN_TEST(a_nan_poisons_its_window);
    RUN_TEST(an_infinite_kv_is_infinite);
    static char suffix[64];
    const char *isa;
    for (int i = 0; (isa = dsv4_isa_name(i)) != NULL; i++) {
        for (int narrow = 0; narrow <= 1; narrow++) {
            snprintf(suffix, sizeof suffix, "%s_%s", isa, narrow ? "bf16" : "f32");
            greatest_set_test_suffix(suffix);
            RUN_TESTp(nothing_is_read_or_written_past_the_end, isa, narrow);
            greatest_set_test_suffix(suffix);
            RUN_TESTp(gradients_do_not_pass_the_end, isa, narrow);
        }
    }
    RUN_TEST(conversions_do_not_pass_the_end);
    RUN_TEST(saved_states_do_not_pass_the_end);
    for (int special = 0; special < SPECIAL_COUNT; special++) {
        for (int i = 0; i < SHAPE_COUNT; i++) {
            snprintf(suffix, sizeof suffix, "%s_%s", specials[special].name, shapes[i].name);
            greatest_set_test_suffix(suffix);
            RUN_TESTp(a_special_token_touches_its_own_windows_alone, &shapes[i], special);
            greatest_set_test_suffix(suffix);
            RUN_TESTp(special_parameters_give_one_answer, &shapes[i], special);
        }
    }
    RUN_TEST(a_nan_in_norm_stays_in_its_channel);
    RUN_TEST(the_oddest_sizes_stream_as_they_compress_whole);
    RUN_TEST(a_stream_of_a_million_tokens_keeps_its_bits);
}

TESTS_MAIN(extremes);
