/* At the edges: arrays that end where memory ends, numbers that are none, the longest streams, the oddest sizes. */

#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#define _POSIX_C_SOURCE 200809L

#include <float.h>

#include "arrays.h"
#include "runner.h"

/* ---- Guard pages ------------------------------------------------------------------------------------------- */

/* Moves an array into fenced memory. */
static void fence(fenced *f, void **array, size_t bytes) {
    *f = fenced_copy(*array, bytes);
    *array = f->data;
}

/* Every width from one vector to three, every mix of types: parameters, tokens and results end at a guard page. */
TEST nothing_is_read_or_written_past_the_end(const char *isa, int narrow) {
    for (int tail = 0; tail <= 34; tail++) {
        shape of = tail_shape(tail, 2, (17 + tail) / 2 * 2, DSV4_F32, DSV4_F32);
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) of.param[i] = (narrow + tail) % 3 ? DSV4_BF16 : DSV4_F32;
        of.x = narrow ? DSV4_BF16 : DSV4_F32;
        of.out = narrow ? DSV4_BF16 : DSV4_F32;
        workbench w = workbench_with(shape_model(&of, 1), shape_sequence(&of, 10, 2), of.out);
        results plain = workbench_results(&w), r = workbench_results(&w);
        engine e = workbench_engine(&w, isa, NULL);
        ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &plain, NULL));

        fenced params[DSV4_PARAM_COUNT], stages[STAGE_COUNT], x;
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
            fence(&params[i], &w.m.data[i], (size_t)w.m.info[i].count * dsv4_dtype_size(of.param[i]));
            model_array(&w.m.params, i)->data = w.m.data[i];
        }
        fence(&x, &w.s.x, (size_t)(10 * w.config.hidden_dim) * dsv4_dtype_size(of.x));
        for (int i = 0; i < STAGE_COUNT; i++) fence(&stages[i], &r.stage[i], r.bytes[i]);
        e = workbench_engine(&w, isa, NULL);
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) fenced_free(&params[i]); /* not needed any more */
        static const int64_t one_call[] = {10}, calls[] = {3};
        ASSERT_EQ(DSV4_OK, compress_cut(&e, &w.s, &r, one_call, 1, NULL));
        ASSERT_EQ(STAGE_COUNT, results_difference(&plain, &r));
        ASSERT_EQ(DSV4_OK, compress_cut(&e, &w.s, &r, calls, 1, NULL));
        ASSERT_EQ(STAGE_COUNT, results_difference(&plain, &r));

        for (int i = 0; i < STAGE_COUNT; i++) fenced_free(&stages[i]);
        fenced_free(&x);
        workbench_free(&w);
    }
    PASS();
}

/* The same on the way back: recomputing, and from the forward pass's rows. */
TEST gradients_do_not_pass_the_end(const char *isa, int narrow) {
    for (int tail = 0; tail <= 34; tail++) {
        const dsv4_dtype dtype = narrow ? DSV4_BF16 : DSV4_F32;
        shape of = tail_shape(tail, 1 + tail % 3, 2, dtype, dtype);
        for (int i = 0; i < DSV4_PARAM_COUNT; i++) of.param[i] = (narrow + tail) % 3 ? DSV4_BF16 : DSV4_F32;
        caller_arrays o = caller_arrays_new(&of, 11, dtype, 1);
        caller_arrays_list(&o);
        const char *wrong = caller_arrays_run_fenced(&o, isa);
        ASSERTm(note("tail %d: %s", tail, wrong ? wrong : ""), !wrong);
        workbench_free(&o.w);
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
    dsv4_state *state = workbench_state(&w, 2), *other = workbench_state(&w, 1);
    for (int64_t t = 0; t < w.s.tokens; t++) {
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, t, t + 1, NULL));
        size_t size = dsv4_state_save_size(state);
        fenced bytes = fenced_new(size);
        ASSERT_EQ(DSV4_OK, dsv4_state_save(state, bytes.data, size, NULL, NULL));
        ASSERT_EQ(DSV4_OK, dsv4_state_restore(other, bytes.data, size, NULL));
        fenced_free(&bytes);
    }
    workbench_free(&w);
    PASS();
}

/* ---- Numbers that are none, and the largest ------------------------------------------------------------------ */

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
            if (special >= SPECIAL_SUBNORMAL) ASSERT(isfinite(result(&r, STAGE_OUT, i)));
        }
    }
    workbench_free(&w);
    PASS();
}

/* A special number anywhere in the parameters: no kernel set crashes, all agree on what is NaN and on every other
 * bit. */
TEST special_parameters_give_one_answer(const shape *of, int special) {
    for (int p = 0; p < DSV4_PARAM_COUNT; p++) {
        workbench w = workbench_new(of, 3, 5);
        if (w.m.info[p].count > 0) {
            set_number(w.m.data[p], of->param[p], w.m.info[p].count / 2, float_of_bits(specials[special].bits));
            engine scalar = workbench_engine(&w, "scalar", NULL);
            results expected = workbench_results(&w);
            ASSERT_EQ(DSV4_OK, compress_whole(&scalar, &w.s, &expected, NULL));
            for (const char *isa = dsv4_isa_name(0); isa && specials[special].bits != 0x00010000;
                 isa = isa_after(isa)) {
                engine e = workbench_engine(&w, isa, NULL);
                results r = workbench_results(&w);
                ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
                for (int stage = 0; stage < STAGE_COUNT; stage++)
                    for (int64_t i = 0; i < r.count[stage]; i++)
                        ASSERTm(note("%s, %s[%d]: %g, not %g", isa, stage_name(stage), (int)i, result(&r, stage, i),
                                     result(&expected, stage, i)),
                                same_number(result(&expected, stage, i), result(&r, stage, i)));
            }
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
        engine e = workbench_engine(&w, NULL, NULL);
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
    }
    workbench_free(&w);
    PASS();
}

/* ---- Sizes ------------------------------------------------------------------------------------------------- */

TEST the_oddest_sizes_stream_as_they_compress_whole(void) {
    static const int64_t cuts[][3] = {{1000, 1, 3000}, {4095, 2, 4097}, {223, 225, 1}};
    for (int i = 0; i < ODD_SHAPE_COUNT; i++) {
        workbench w = workbench_new(&odd_shapes[i], odd_shapes[i].config.ratio > 1000 ? 3 : 40, 7);
        for (int k = 0; k < 3; k++) {
            results cut = workbench_results(&w);
            ASSERT_EQ(DSV4_OK, compress_cut(&w.e, &w.s, &cut, cuts[k], 3, NULL));
            ASSERT_SAME_BITS(&w.whole, &cut, odd_shapes[i].name);
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
    of.config.hidden_dim = 2;
    of.config.head_dim = 32;
    of.config.rounding = DSV4_ROUNDING_DEEPSEEK;
    of.config.sums = DSV4_SUMS_PAIRS;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) of.param[i] = i == DSV4_APE ? DSV4_F32 : DSV4_BF16;
    if (getenv("TESTS_SLOW")) of.config.head_dim = 512, of.config.rope_dim = 64;
    workbench w = workbench_new(&of, PERIOD / 4, 8);
    results chunk = workbench_results(&w), alone = workbench_results(&w);
    dsv4_state *state = workbench_state(&w, depth_for_weights(&w.config));
    size_t row = chunk.bytes[STAGE_OUT] / (size_t)chunk.entries;
    for (int64_t t = 0; t < TOKENS; t += PERIOD) {
        int64_t count = TOKENS - t < PERIOD ? TOKENS - t : PERIOD, probe = t / PERIOD % (count / 4 - 1);
        dsv4_segment part = segment_new(0, count, t, 0, state);
        dsv4_batch b = batch_new(&w.s, &chunk, &part, 1);
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        dsv4_segment two = segment_new(4 * probe, 8, t + 4 * probe, 0, NULL); /* window probe + 1, and the one before */
        b = batch_new(&w.s, &alone, &two, 1);
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        ASSERT_MEM_EQ((char *)alone.stage[STAGE_OUT] + row, (char *)chunk.stage[STAGE_OUT] + (size_t)(probe + 1) * row,
                      row);
    }
    ASSERT_EQ_FMT((int)TOKENS, (int)dsv4_state_tokens(state), "%d");
    workbench_free(&w);
    PASS();
}

/* ---- Special values in one row of a window ----------------------------------------------------------------- */

/* Whether it pools to this number, however the window is cut, by every kernel set, folded or with rounded weights. */
static int pools_to(const window_case *of, float expected) {
    static const uint32_t roundings_tried[] = {0, DSV4_ROUND_WEIGHT};
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa))
        for (int r = 0; r < 2; r++) {
            window_case w = *of;
            w.rounding = roundings_tried[r];
            for (int64_t cut = 0; cut < 4; cut++)
                for (int64_t depth = 0; depth < 3; depth += 2) {
                    float got = -1;
                    if (pool_window(&w, isa, cut, depth, NULL, &got) != DSV4_OK) return 0;
                    if (isnan(expected) ? !isnan(got) : got != expected) return 0;
                }
        }
    return 1;
}

TEST a_score_of_minus_infinity_weighs_nothing(void) {
    for (int row = 0; row < 4; row++) {
        window_case w = {{2, 2, 2, 2}, {5, 5, 5, 5}, 0};
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
    const window_case w = {{1, 2, 3, 4}, {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, 0};
    ASSERT(pools_to(&w, NAN));
    PASS();
}

TEST a_nan_poisons_its_window(void) {
    for (int row = 0; row < 4; row++) {
        window_case score = {{1, 2, 3, 4}, {0, 0, 0, 0}, 0}, kv = score;
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
        window_case w = {{1, 2, 3, 4}, {0, 0, 0, 0}, 0};
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
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        for (int narrow = 0; narrow <= 1; narrow++) {
            RUN_NAMED(note("%s_%s", isa, narrow ? "bf16" : "f32"), nothing_is_read_or_written_past_the_end, isa,
                      narrow);
            RUN_NAMED(note("%s_%s", isa, narrow ? "bf16" : "f32"), gradients_do_not_pass_the_end, isa, narrow);
        }
    }
    RUN_TEST(conversions_do_not_pass_the_end);
    RUN_TEST(saved_states_do_not_pass_the_end);
    for (int special = 0; special < SPECIAL_COUNT; special++) {
        for (int i = 0; i < SHAPE_COUNT; i++) {
            RUN_NAMED(note("%s_%s", specials[special].name, shapes[i].name),
                      a_special_token_touches_its_own_windows_alone, &shapes[i], special);
            RUN_NAMED(note("%s_%s", specials[special].name, shapes[i].name), special_parameters_give_one_answer,
                      &shapes[i], special);
        }
    }
    RUN_TEST(a_nan_in_norm_stays_in_its_channel);
    RUN_TEST(the_oddest_sizes_stream_as_they_compress_whole);
    RUN_TEST(a_stream_of_a_million_tokens_keeps_its_bits);
}

TESTS_MAIN(extremes);
