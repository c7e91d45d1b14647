/* One answer: the output's bits do not depend on the kernel set, the threads (pthread), the cuts, the order of
 * segments, what shares the call, where arrays lie. And what it costs in memory. */

#define _POSIX_C_SOURCE 200809L

#include "runner.h"
#include "workbench.h"
#include "threads.h"

/* Results of `s` through a compressor made for the occasion. */
static results compress_with(workbench *w, const char *isa, const dsv4_parallel *parallel, const int64_t *cuts,
                             int cut_count) {
    engine e = engine_new(&w->m, isa, parallel);
    results r = workbench_results(w);
    dsv4_status status =
        cuts ? compress_cut(&e, &w->s, &r, cuts, cut_count, NULL) : compress_whole(&e, &w->s, &r, NULL);
    if (status != DSV4_OK) memset(r.stage[STAGE_KV], POISON, r.bytes[STAGE_KV]);
    engine_free(&e);
    return r;
}

static workbench workbench_of(const shape *of) { return workbench_new(of, shape_windows(of, 7), 31); }

/* ---- Kernel sets, threads, cuts ---------------------------------------------------------------------------- */

TEST every_kernel_set_gives_the_bits_of_the_scalar_one(const shape *of) {
    workbench w = workbench_of(of);
    results scalar = compress_with(&w, "scalar", NULL, NULL, 0);
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        results r = compress_with(&w, isa, NULL, NULL, 0);
        ASSERT_SAME_BITS(&scalar, &r, isa);
    }
    workbench_free(&w);
    PASS();
}

TEST layers_of_one_configuration_share_a_workspace(const shape *of) {
    workbench w = workbench_of(of);
    workbench other = workbench_new(of, shape_windows(of, 7), 32);
    engine borrowed = other.e, whole = workbench_engine(&w, NULL, NULL);
    borrowed.workspace = whole.workspace;
    for (int round = 0; round < 2; round++) {
        results mine = workbench_results(&w), theirs = workbench_results(&other);
        ASSERT_EQ(DSV4_OK, compress_whole(&whole, &w.s, &mine, NULL));
        ASSERT_EQ(DSV4_OK, compress_whole(&borrowed, &other.s, &theirs, NULL));
        ASSERT_SAME_BITS(&w.whole, &mine, "its own");
        ASSERT_SAME_BITS(&other.whole, &theirs, "another layer's");
    }
    workbench_free(&other);
    workbench_free(&w);
    PASS();
}

TEST every_parallel_for_gives_the_bits_of_one_thread(const shape *of) {
    workbench w = workbench_of(of);
    for (int t = 0; t < SCHEDULE_COUNT; t++) {
        team c;
        dsv4_parallel parallel = schedule_parallel(&schedules[t], &c);
        results r = compress_with(&w, NULL, &parallel, NULL, 0);
        ASSERT_SAME_BITS(&w.whole, &r, schedules[t].name);
        if (of->tokens && schedules[t].threads > 1) ASSERTm("the callback was used", c.calls > 0);
    }
    workbench_free(&w);
    PASS();
}

/* Each kernel set with each parallel-for in each cut; of long sequences one pairing in four. */
TEST all_of_it_together_gives_the_same_bits(const shape *of) {
    static const int64_t cuts[][3] = {{1, 1, 1}, {3, 5, 2}, {230, 1, 97}};
    workbench w = workbench_of(of);
    const char *isa;
    for (int k = 0; (isa = dsv4_isa_name(k)) != NULL; k++) {
        for (int t = 0; t < SCHEDULE_COUNT; t++) {
            team c;
            dsv4_parallel parallel = schedule_parallel(&schedules[t], &c);
            if (of->tokens && (k + t) % 4 != 0) continue;
            results r = compress_with(&w, isa, &parallel, cuts[(k + t) % 3], 3);
            ASSERT_SAME_BITS(&w.whole, &r, note("%s %s", isa, schedules[t].name));
        }
    }
    workbench_free(&w);
    PASS();
}

/* Sums whose exact value lies so close beside the middle between two fp32 numbers that double precision does not see
 * on which side: x0 w0 + x1 w1 with a product of 48 bits. */
TEST multiply_adds_are_rounded_once(void) {
    static const struct {
        float x0, x1, w1;
        uint32_t sum;
    } cases[] = {
        {0x1.000002p0f, 0x1.0002p0f, 0x1.fffcp-26f, 0x3F800001}, /* 2^-24 - 2^-54: below the middle */
        {-0x1.000002p0f, -0x1.0002p0f, 0x1.fffcp-26f, 0xBF800001},
        {1, 13325, 0x1.3ac5p-38f, 0x3F800001}, /* 2^-24 + 2^-54: above it */
        {-1, 13325, -0x1.3ac5p-38f, 0xBF800001},
        {1, 11801, 5823191 * 0x1p-60f, 0x3F800001}, /* 2^-24 + 2^-52 - 2^-60 */
        {0x1.000002p0f, 13325, -0x1.3ac5p-38f, 0x3F800000},
        {0x1.000004p0f, -0x1.0002p0f, 0x1.fffcp-26f, 0x3F800002},
        {1, 0x1p-24f, 1, 0x3F800000}, /* exactly the middle: to even */
        {0x1.000002p0f, 0x1p-24f, 1, 0x3F800002},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const float x[2] = {cases[i].x0, cases[i].x1}, weights[2] = {1, cases[i].w1}, one = 1;
        workbench w = {.config = {.hidden_dim = 2, .head_dim = 1, .ratio = 1, .no_ape = 1, .no_gate = 1}};
        w.m.config = w.config;
        w.m.params = (dsv4_params){.wkv = {weights, DSV4_F32, 0}, .norm = {&one, DSV4_F32, 0}};
        w.s = (sequence){(void *)(uintptr_t)x, DSV4_F32, 1, 0};
        w.entries = 1;
        for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
            engine e = workbench_engine(&w, isa, NULL);
            results r = workbench_results_in(&w, DSV4_F32);
            ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
            unsigned sum = bits_of_float(*(float *)r.stage[STAGE_KV]);
            ASSERTm(note("case %d, %s: %#x, not %#x", (int)i, isa, sum, (unsigned)cases[i].sum), sum == cases[i].sum);
        }
        workbench_free(&w);
    }
    PASS();
}

/* ---- Segments ---------------------------------------------------------------------------------------------- */

TEST the_order_of_segments_does_not_matter(const shape *of) {
    enum { COUNT = 6 };
    workbench w = workbench_new(of, 5 * COUNT, 32);
    dice d = {3};
    results first = workbench_results(&w);
    for (int round = 0; round < 6; round++) {
        dsv4_segment segments[COUNT];
        for (int i = 0; i < COUNT; i++) {
            int64_t tokens = 5 * w.config.ratio;
            segments[i] = segment_new(i * tokens, tokens, 100 * i, 5 * i, NULL);
        }
        for (int i = COUNT - 1; i > 0 && round > 0; i--) {
            int k = (int)dice_below(&d, i + 1);
            dsv4_segment swapped = segments[i];
            segments[i] = segments[k];
            segments[k] = swapped;
        }
        results r = workbench_results(&w);
        dsv4_batch b = batch_new(&w.s, &r, segments, COUNT);
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        if (round == 0) memcpy(first.stage[STAGE_OUT], r.stage[STAGE_OUT], r.bytes[STAGE_OUT]);
        ASSERT_MEM_EQ(first.stage[STAGE_OUT], r.stage[STAGE_OUT], r.bytes[STAGE_OUT]);
    }
    workbench_free(&w);
    PASS();
}

/* Entries may go anywhere, and rows that no segment names stay as they were. */
TEST entries_go_where_the_segment_says(const shape *of) {
    workbench w = workbench_new(of, 4, 33);
    results r = keep_results(&w, results_new(&w.config, w.out_dtype, w.s.tokens, 9));
    dsv4_segment whole = segment_new(0, w.s.tokens, w.s.position, 3, NULL);
    dsv4_batch b = batch_new(&w.s, &r, &whole, 1);
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    for (int stage = STAGE_WEIGHTS; stage < STAGE_COUNT; stage++) {
        size_t entry = r.bytes[stage] / 9;
        const char *at = r.stage[stage];
        ASSERT(memory_untouched(at, 3 * entry));
        ASSERT_MEM_EQ(w.whole.stage[stage], at + 3 * entry, 4 * entry);
        ASSERT(memory_untouched(at + 7 * entry, 2 * entry));
    }
    workbench_free(&w);
    PASS();
}

/* ---- Where arrays lie -------------------------------------------------------------------------------------- */

/* Rows further apart than they are wide; what lies between is not touched. Arrays at any address their type allows. */
TEST strides_and_addresses_do_not_matter(const shape *of) {
    workbench w = workbench_new(of, 3, 34);
    size_t x_number = dsv4_dtype_size(w.s.dtype), out_number = dsv4_dtype_size(w.out_dtype);
    size_t x_row = (size_t)w.config.hidden_dim * x_number, out_row = (size_t)w.config.head_dim * out_number;
    for (int64_t gap = 0; gap < 20; gap += 3) {
        int64_t x_stride = w.config.hidden_dim + gap, out_stride = w.config.head_dim + gap;
        size_t x_bytes = (size_t)(x_stride * w.s.tokens) * x_number, offset = (size_t)gap;
        size_t out_bytes = (size_t)(out_stride * w.whole.entries) * out_number;
        char *x = workbench_memory(&w, x_bytes + 20 * x_number);
        char *out = workbench_memory(&w, out_bytes + 20 * out_number);
        memset(x, 0xFF, x_bytes + 20 * x_number);
        memset(out, POISON, out_bytes + 20 * out_number);
        for (int64_t t = 0; t < w.s.tokens; t++)
            memcpy(x + (offset + (size_t)(t * x_stride)) * x_number, (char *)w.s.x + (size_t)t * x_row, x_row);
        dsv4_batch b = workbench_batch(&w, &w.whole);
        memset(&b.stages, 0, sizeof b.stages);
        b.x.data = x + offset * x_number;
        b.x.stride = x_stride;
        b.out.data = out + offset * out_number;
        b.out.stride = out_stride;
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        ASSERT(memory_untouched(out, offset * out_number));
        for (int64_t e = 0; e < w.whole.entries; e++) {
            const char *row = out + (offset + (size_t)(e * out_stride)) * out_number;
            ASSERT_MEM_EQ((char *)w.whole.stage[STAGE_OUT] + (size_t)e * out_row, row, out_row);
            ASSERT(memory_untouched(row + out_row, (size_t)gap * out_number));
        }
    }
    workbench_free(&w);
    PASS();
}

/* Whether a stage is asked for changes no other. */
TEST stages_are_by_request_and_change_nothing(const shape *of) {
    workbench w = workbench_new(of, 3, 35);
    for (int wanted = STAGE_KV; wanted < STAGE_COUNT; wanted++) {
        results r = workbench_results(&w);
        dsv4_batch b = workbench_batch(&w, &r);
        dsv4_stages all = b.stages;
        memset(&b.stages, 0, sizeof b.stages);
        if (wanted == STAGE_KV) b.stages.kv = all.kv;
        if (wanted == STAGE_GATE) b.stages.gate = all.gate;
        if (wanted == STAGE_WEIGHTS) b.stages.weights = all.weights;
        if (wanted == STAGE_POOLED) b.stages.pooled = all.pooled;
        if (wanted == STAGE_LATENT) b.stages.latent = all.latent;
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        for (int stage = 0; stage < STAGE_COUNT; stage++) {
            if (stage == wanted || stage == STAGE_OUT)
                ASSERT_MEM_EQ(w.whole.stage[stage], r.stage[stage], r.bytes[stage]);
            else
                ASSERT(memory_untouched(r.stage[stage], r.bytes[stage]));
        }
    }
    workbench_free(&w);
    PASS();
}

/* Projections from elsewhere: what stages.kv and stages.gate gave, handed back instead of x, in one call and in
 * cuts. */
TEST given_projections_give_the_same_entries(const shape *of) {
    workbench w = workbench_of(of);
    for (int way = 2; way <= 7; way++) { /* in one to three parts, without the stage of weights and with it */
        const int parts = way / 2, weights = way % 2;
        dsv4_state *state = workbench_state(&w, weights ? depth_for_weights(&w.config) : 0);
        results r = workbench_results(&w);
        *r.no_weights = !weights;
        for (int part = 0; part < parts; part++) {
            int64_t from = w.s.tokens * part / parts, to = w.s.tokens * (part + 1) / parts;
            dsv4_segment segment =
                segment_new(from, to - from, w.s.position + from, from / w.config.ratio, parts == 1 ? NULL : state);
            dsv4_batch b = batch_new(&w.s, &r, &segment, 1);
            b.x.data = NULL;
            b.kv = w.whole.stage[STAGE_KV];
            b.gate = w.config.no_gate ? NULL : w.whole.stage[STAGE_GATE];
            if (!weights) b.stages.weights = NULL;
            ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        }
        ASSERT_SAME_BITS(&w.whole, &r, note("%d parts", parts));
    }
    workbench_free(&w);
    PASS();
}

/* Long windows of given projections are folded some rows at a time. What window 0 lacks is none of these, unless its
 * pad is finite: with scores so low that e^score is 0, too. (With the stage of weights all rows go in one.) */
TEST long_windows_begin_with_their_first_row(float shift, float pad_gate) {
    shape long_window = shapes[1];
    long_window.config.ratio = 72;
    long_window.config.pad_gate = pad_gate;
    long_window.tokens = 216;
    ASSERT(long_window.config.overlap && long_window.config.rounding == DSV4_ROUNDING_NONE);
    workbench w = workbench_of(&long_window);
    const int64_t numbers = 2 * w.s.tokens * w.config.head_dim;
    float *gate = workbench_memory(&w, (size_t)numbers * sizeof *gate);
    for (int64_t i = 0; i < numbers; i++) gate[i] = ((float *)w.whole.stage[STAGE_GATE])[i] + shift;
    results some_rows = workbench_results(&w), all_rows = workbench_results(&w);
    *some_rows.no_weights = 1;
    results *const both[] = {&some_rows, &all_rows};
    for (int i = 0; i < 2; i++) {
        dsv4_batch b = workbench_batch(&w, both[i]);
        b.x.data = NULL;
        b.kv = w.whole.stage[STAGE_KV];
        b.gate = gate;
        if (i == 0) b.stages.weights = NULL;
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    }
    ASSERT_SAME_BITS(&all_rows, &some_rows, note("scores near %g", (double)shift));
    for (int64_t i = 0; i < w.config.head_dim; i++) ASSERT(isfinite(((float *)some_rows.stage[STAGE_POOLED])[i]));
    workbench_free(&w);
    PASS();
}

/* ---- Memory ------------------------------------------------------------------------------------------------ */

/* All an object takes from its allocator is one block, of the size announced. */
TEST objects_take_the_memory_they_announce(const shape *of) {
    workbench w = workbench_new(of, 1, 36);
    for (int training = 0; training <= 1; training++) {
        for (int threads = -1; threads <= 3; threads++) {
            ledger l = {0};
            dsv4_allocator a = ledger_allocator(&l);
            dsv4_options options = {0};
            options.training = training;
            team c;
            const schedule two = {"", forward_run, threads};
            dsv4_parallel parallel = schedule_parallel(&two, &c);
            dsv4_compressor *compressor = NULL;
            dsv4_workspace *workspace = NULL;
            dsv4_state *state = NULL;
            size_t bytes = 0, sum = 0;

            ASSERT_EQ(DSV4_OK, dsv4_compressor_size(&w.config, &w.m.params, &options, &bytes, NULL));
            ASSERT_EQ(DSV4_OK, dsv4_compressor_create(&w.config, &w.m.params, &options, &a, &compressor, NULL));
            ASSERT_EQ_FMT((int)bytes, (int)l.last_size, "%d");
            sum += bytes;
            ASSERT_EQ(DSV4_OK, dsv4_workspace_size(compressor, threads, &bytes, NULL));
            ASSERT_EQ(DSV4_OK, dsv4_workspace_create(compressor, &parallel, &a, &workspace, NULL));
            ASSERT_EQ_FMT((int)bytes, (int)l.last_size, "%d");
            sum += bytes;
            ASSERT_EQ(DSV4_OK, dsv4_state_size(compressor, 5, &bytes, NULL));
            ASSERT_EQ(DSV4_OK, dsv4_state_create(compressor, 5, &a, &state, NULL));
            ASSERT_EQ_FMT((int)bytes, (int)l.last_size, "%d");
            ASSERT_EQ_FMT((int)DSV4_ALIGNMENT, (int)l.last_alignment, "%d");
            sum += bytes;
            ASSERT_EQ_FMT((int)sum, (int)l.live_bytes, "%d");
            ASSERT_EQ_FMT(3, (int)l.calls, "%d");

            results r = workbench_results(&w);
            engine e = {compressor, workspace};
            ASSERT_EQ(DSV4_OK, compress_part(&e, &w.s, &r, state, 0, w.s.tokens, NULL));
            ASSERT_SAME_BITS(&w.whole, &r, note("%d threads", threads));
            ASSERT_EQ_FMT(3, (int)l.calls, "%d");

            dsv4_state_destroy(state);
            dsv4_workspace_destroy(workspace);
            dsv4_compressor_destroy(compressor);
            ASSERT_EQ_FMT(0, (int)l.live, "%d");
            ASSERT_FALSE(l.wrong);
        }
    }
    workbench_free(&w);
    PASS();
}

/* The published models: packed weights within 1.05 of their bytes, scratch under 2 MiB a thread, 4 MiB at ratio 128. */
TEST published_models_keep_to_their_memory(dsv4_preset preset, dsv4_dtype dtype) {
    dsv4_config config = dsv4_preset_config(preset);
    dsv4_param_info info[DSV4_PARAM_COUNT];
    ASSERT_EQ(DSV4_OK, dsv4_config_params(&config, info, NULL));
    size_t weights = 0, bytes = 0;
    workbench w = {.config = config, .m = {.config = config}};
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (info[i].count == 0) continue;
        size_t array = (size_t)info[i].count * dsv4_dtype_size(dtype);
        weights += array;
        const void *zeros = keep(&w, calloc(array, 1));
        ASSERT(zeros != NULL);
        *model_array(&w.m.params, i) = (dsv4_const_matrix){zeros, dtype, 0};
    }
    ASSERT_EQ(DSV4_OK, dsv4_compressor_size(&config, &w.m.params, NULL, &bytes, NULL));
    ASSERTm(note("%zu bytes for weights of %zu", bytes, weights), (double)bytes <= 1.05 * (double)weights);

    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        engine e = engine_new(&w.m, isa, NULL); /* large ones, one at a time */
        size_t limit = (size_t)(config.ratio == 128 ? 4 : 2) << 20;
        for (int threads = 1; threads <= 8; threads += 7) {
            ASSERT_EQ(DSV4_OK, dsv4_workspace_size(e.compressor, threads, &bytes, NULL));
            ASSERTm(note("%zu bytes for %d threads (%s)", bytes, threads, isa), bytes < limit * (size_t)threads);
        }
        engine_free(&e);
    }
    workbench_free(&w);
    PASS();
}

/* ---- The suite --------------------------------------------------------------------------------------------- */

SUITE(bits) {
    FOR_SHORT_AND_LONG_SHAPES(every_kernel_set_gives_the_bits_of_the_scalar_one, of);
    FOR_SHORT_AND_LONG_SHAPES(every_parallel_for_gives_the_bits_of_one_thread, of);
    FOR_SHORT_AND_LONG_SHAPES(all_of_it_together_gives_the_same_bits, of);
    FOR_SHORT_AND_LONG_SHAPES(given_projections_give_the_same_entries, of);
    RUN_TESTp(long_windows_begin_with_their_first_row, -0.25f, 0);
    RUN_TESTp(long_windows_begin_with_their_first_row, -200.0f, 0);
    RUN_TESTp(long_windows_begin_with_their_first_row, -200.0f, -199.0f);
    RUN_TESTp(layers_of_one_configuration_share_a_workspace, &shapes[0]);
    RUN_TESTp(layers_of_one_configuration_share_a_workspace, &long_shapes[0]);
    RUN_TEST(multiply_adds_are_rounded_once);
    FOR_EVERY_SHAPE(the_order_of_segments_does_not_matter, of);
    FOR_EVERY_SHAPE(entries_go_where_the_segment_says, of);
    FOR_EVERY_SHAPE(strides_and_addresses_do_not_matter, of);
    FOR_EVERY_SHAPE(stages_are_by_request_and_change_nothing, of);
    FOR_EVERY_SHAPE(objects_take_the_memory_they_announce, of);
    for (int preset = 0; preset < DSV4_PRESET_COUNT; preset++) {
        RUN_NAMED(dsv4_preset_name((dsv4_preset)preset), published_models_keep_to_their_memory, (dsv4_preset)preset,
                  DSV4_BF16);
    }
    RUN_NAMED("f32", published_models_keep_to_their_memory, DSV4_V4_FLASH_CSA, DSV4_F32);
}

TESTS_MAIN(bits);
