/* What the compressor's first implementation, in pre-training, was tested for: nine properties, here by the same
 * names. */

#define _POSIX_C_SOURCE 200809L

#include "runner.h"
#include "golden_file.h"

static dsv4_config small_config(int64_t ratio, int overlap) {
    return (dsv4_config){.hidden_dim = 48,
                         .head_dim = 24,
                         .ratio = ratio,
                         .rope_dim = 8,
                         .overlap = overlap,
                         .pad_gate = -1e4f}; /* as that implementation had it */
}

/* `rows` sequences of `tokens` each in one call. */
static dsv4_status compress_rows(workbench *w, const results *r, int64_t rows, int64_t tokens) {
    const int64_t entries = tokens / w->config.ratio;
    dsv4_segment *segments = workbench_memory(w, (size_t)rows * sizeof *segments);
    for (int64_t i = 0; i < rows; i++) segments[i] = segment_new(i * tokens, tokens, 0, i * entries, NULL);
    dsv4_batch b = batch_new(&w->s, r, segments, rows);
    if (rows == 0) b.tokens = 0;
    return dsv4_compress(w->e.compressor, &b, w->e.workspace, NULL);
}

/* Every number of the first `used` of `rows` rows is written and finite, and none of the rows after them touched. */
static int fills_exactly(const results *r, int stage, int64_t rows, int64_t used) {
    double empty = result(r, stage, r->count[stage] - 1);
    int64_t written = r->count[stage] / rows * used;
    for (int64_t i = 0; i < written; i++) {
        double v = result(r, stage, i);
        if (!isfinite(v) || v == empty) return 0;
    }
    size_t first = r->bytes[stage] / (size_t)rows * (size_t)used;
    return memory_untouched((const char *)r->stage[stage] + first, r->bytes[stage] - first);
}

/* The name of a stage that is not of its shape, [B, S, ...] or [B, S / ratio, ...]; NULL where all are. */
static const char *misshapen(const dsv4_config *config, dsv4_dtype dtype, int64_t batch, int64_t tokens) {
    workbench w = workbench_for(config, dtype, batch * tokens, 1);
    const int64_t entries = batch * (tokens / config->ratio);
    results r = keep_results(&w, results_new(config, dtype, batch * tokens + 1, entries + 1));
    const char *wrong = compress_rows(&w, &r, batch, tokens) == DSV4_OK ? NULL : "status";
    for (int stage = 0; stage < STAGE_COUNT && !wrong; stage++) {
        int by_token = stage == STAGE_KV || stage == STAGE_GATE;
        int64_t used = by_token ? batch * tokens : entries;
        if (!fills_exactly(&r, stage, used + 1, used)) wrong = stage_name(stage);
    }
    workbench_free(&w);
    return wrong;
}

TEST csa_shapes(void) {
    dsv4_config c = small_config(4, 1);
    for (int64_t batch = 1; batch <= 3; batch++)
        for (int64_t tokens = 4; tokens <= 64; tokens += 20)
            for (int dtype = DSV4_F32; dtype <= DSV4_BF16; dtype++)
                ASSERT_EQ(NULL, misshapen(&c, (dsv4_dtype)dtype, batch, tokens));
    PASS();
}

TEST hca_shapes(void) {
    dsv4_config c = small_config(128, 0);
    for (int64_t batch = 1; batch <= 2; batch++)
        for (int64_t tokens = 128; tokens <= 384; tokens += 128)
            for (int dtype = DSV4_F32; dtype <= DSV4_BF16; dtype++)
                ASSERT_EQ(NULL, misshapen(&c, (dsv4_dtype)dtype, batch, tokens));
    PASS();
}

static char message[256];

TEST csa_equivalence_with_pytorch(void) {
    static const char *const files[] = {"csa_none", "csa_deepseek", "csa_maxtext", "csa_transformers"};
    for (int i = 0; i < 4; i++) ASSERTm(message, golden_passes(files[i], dsv4_isa_name(0), message, sizeof message));
    PASS();
}

TEST hca_equivalence_with_pytorch(void) {
    static const char *const files[] = {"hca_none", "hca_deepseek", "hca_maxtext", "hca_transformers"};
    for (int i = 0; i < 4; i++) ASSERTm(message, golden_passes(files[i], dsv4_isa_name(0), message, sizeof message));
    PASS();
}

/* No sequence, one, and very many in a call: each row as if it were alone. */
TEST extreme_batch_sizes(void) {
    enum { ROWS = 1000, TOKENS = 8 };
    dsv4_config c = small_config(4, 1);
    workbench w = workbench_for(&c, DSV4_F32, ROWS * TOKENS, 3);
    results together = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_rows(&w, &together, 0, TOKENS));
    ASSERT(results_untouched(&together));
    ASSERT_EQ(DSV4_OK, compress_rows(&w, &together, ROWS, TOKENS));
    for (int64_t row = 0; row < ROWS; row += 111) {
        sequence one = w.s;
        one.x = (float *)w.s.x + row * TOKENS * c.hidden_dim;
        one.tokens = TOKENS;
        results alone = keep_results(&w, results_new(&c, DSV4_F32, TOKENS, TOKENS / 4));
        ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &one, &alone, NULL));
        for (int stage = 0; stage < STAGE_COUNT; stage++) {
            const char *of_the_batch = (const char *)together.stage[stage] + (size_t)row * alone.bytes[stage];
            ASSERT_MEM_EQ(alone.stage[stage], of_the_batch, alone.bytes[stage]);
        }
    }
    workbench_free(&w);
    PASS();
}

/* Configuration and parameters are separate things: a configuration lists the arrays it needs, the same configuration
 * runs with other parameters, and the compressor keeps a configuration with its defaults filled in. */
TEST state_splitting(void) {
    dsv4_config c = small_config(4, 1);
    dsv4_param_info info[DSV4_PARAM_COUNT];
    ASSERT_EQ(DSV4_OK, dsv4_config_params(&c, info, NULL));
    static const struct {
        const char *name;
        int64_t rows, columns;
    } expected[DSV4_PARAM_COUNT] = {{"wkv", 48, 48}, {"wgate", 48, 48}, {"ape", 4, 48}, {"norm", 1, 24}};
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        ASSERT_STR_EQ(expected[i].name, info[i].name);
        ASSERT_EQ_FMT((int)expected[i].rows, (int)info[i].rows, "%d");
        ASSERT_EQ_FMT((int)expected[i].columns, (int)info[i].columns, "%d");
        ASSERT_EQ_FMT((int)(expected[i].rows * expected[i].columns), (int)info[i].count, "%d");
    }

    model first = model_of(&c, DSV4_F32, 10);
    workbench w = workbench_for(&c, DSV4_F32, 8, 11); /* with the second parameters */
    engine of_first = keep_engine(&w, engine_new(&first, NULL, NULL));
    results a = workbench_results(&w), b = workbench_results(&w), again = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&of_first, &w.s, &a, NULL));
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &b, NULL));
    ASSERT_EQ(STAGE_KV, results_difference(&a, &b));

    const dsv4_config *kept = dsv4_compressor_config(of_first.compressor);
    ASSERT_EQ_FMT(1e-6f, kept->eps, "%g");
    ASSERT_EQ_FMT(-1e4f, kept->pad_gate, "%g");
    ASSERT_EQ_FMT(160000.0, kept->rope_theta, "%g");
    ASSERT_EQ_FMT((int)c.head_dim, (int)kept->head_dim, "%d");

    /* The compressor keeps no pointer into the parameters. */
    model_free(&first);
    ASSERT_EQ(DSV4_OK, compress_whole(&of_first, &w.s, &again, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&a, &again));

    workbench_free(&w);
    PASS();
}

TEST lengths_the_ratio_does_not_divide(void) {
    static const int64_t ratios[] = {2, 3, 4, 128};
    for (int i = 0; i < 4; i++) {
        dsv4_config c = small_config(ratios[i], i % 2);
        int64_t tokens = 2 * ratios[i] + ratios[i] / 2;
        workbench w = workbench_for(&c, DSV4_F32, tokens, 1);
        results strict = workbench_results(&w), dropped = workbench_results(&w);
        dsv4_batch b = workbench_batch(&w, &strict);
        dsv4_error error = {0};

        b.drop_tail = 0;
        ASSERT_EQ(DSV4_ERROR_LENGTH, dsv4_compress(w.e.compressor, &b, w.e.workspace, &error));
        ASSERT_EQ(DSV4_ERROR_LENGTH, error.status);
        char number_text[24];
        snprintf(number_text, sizeof number_text, "%d", (int)tokens);
        ASSERTm(note("%s", error.text), strstr(error.text, number_text) != NULL);
        snprintf(number_text, sizeof number_text, "%d", (int)ratios[i]);
        ASSERTm(note("%s", error.text), strstr(error.text, number_text) != NULL);
        ASSERT(results_untouched(&strict));

        /* With the tail dropped: the entries of the whole windows, as if the tail were not there. */
        ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &dropped, NULL));
        w.s.tokens = 2 * ratios[i];
        ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &strict, NULL));
        ASSERT_MEM_EQ(strict.stage[STAGE_OUT], dropped.stage[STAGE_OUT], strict.bytes[STAGE_OUT]);
        ASSERT_EQ_FMT(2, (int)dsv4_entry_count(&c, NULL, tokens), "%d");
        workbench_free(&w);
    }
    PASS();
}

TEST reproducible_random_initialisation(void) {
    dsv4_config c = small_config(4, 1);
    dsv4_param_info info[DSV4_PARAM_COUNT];
    ASSERT_EQ(DSV4_OK, dsv4_config_params(&c, info, NULL));
    for (int p = 0; p < DSV4_PARAM_COUNT; p++) {
        int64_t n = info[p].count;
        float *a = reserve((size_t)n * 4), *b = reserve((size_t)n * 4), *other = reserve((size_t)n * 4);
        uint16_t *narrow = reserve((size_t)n * 2);
        ASSERT_EQ(DSV4_OK, dsv4_param_init(&c, (dsv4_param)p, 42, matrix_of(a, DSV4_F32), NULL));
        ASSERT_EQ(DSV4_OK, dsv4_param_init(&c, (dsv4_param)p, 42, matrix_of(b, DSV4_F32), NULL));
        ASSERT_EQ(DSV4_OK, dsv4_param_init(&c, (dsv4_param)p, 43, matrix_of(other, DSV4_F32), NULL));
        ASSERT_EQ(DSV4_OK, dsv4_param_init(&c, (dsv4_param)p, 42, matrix_of(narrow, DSV4_BF16), NULL));
        ASSERT_MEM_EQ(a, b, (size_t)n * 4);
        double mean = 0, square = 0, most = 0;
        int64_t same = 0;
        for (int64_t i = 0; i < n; i++) {
            ASSERT_EQ_FMT((unsigned)dsv4_bf16_from_f32(a[i]), (unsigned)narrow[i], "%#x");
            mean += a[i] / (double)n;
            square += (double)a[i] * a[i] / (double)n;
            most = fmax(most, fabs((double)a[i]));
            same += a[i] == other[i];
        }
        if (p == DSV4_NORM) {
            ASSERT_EQ_FMT((int)n, (int)same, "%d");
            for (int64_t i = 0; i < n; i++) ASSERT_EQ_FMT(1.0f, a[i], "%g");
        } else {
            double variance = p == DSV4_APE ? 1.0 / 12 : 1.0 / 48;
            ASSERTm(info[p].name, same < 3);
            ASSERTm(info[p].name, fabs(mean) < 6 * sqrt(variance / (double)n));
            ASSERTm(info[p].name, fabs(square / variance - 1) < 6 / sqrt((double)n));
            ASSERTm(info[p].name, most <= sqrt(3 * variance) * 1.000001 && most > 0.95 * sqrt(3 * variance));
        }
        free(narrow);
        free(other);
        free(b);
        free(a);
    }
    PASS();
}

/* The same numbers whichever array they fill: element i is a function of seed, parameter and i. */
TEST initialisation_does_not_depend_on_the_array_being_larger(void) {
    dsv4_config small = small_config(4, 1), large = small_config(8, 1);
    float a[4 * 48], b[8 * 48];
    ASSERT_EQ(DSV4_OK, dsv4_param_init(&small, DSV4_APE, 7, matrix_of(a, DSV4_F32), NULL));
    ASSERT_EQ(DSV4_OK, dsv4_param_init(&large, DSV4_APE, 7, matrix_of(b, DSV4_F32), NULL));
    ASSERT_MEM_EQ(a, b, sizeof a);
    PASS();
}

/* Nor on gaps between its rows, which are not touched. */
TEST initialisation_does_not_depend_on_the_stride(void) {
    const dsv4_config c = small_config(4, 1);
    float dense[4 * 48], apart[3 * 53 + 48];
    const dsv4_matrix rows = {apart, DSV4_F32, 53};
    memset(apart, POISON, sizeof apart);
    ASSERT_EQ(DSV4_OK, dsv4_param_init(&c, DSV4_APE, 7, matrix_of(dense, DSV4_F32), NULL));
    ASSERT_EQ(DSV4_OK, dsv4_param_init(&c, DSV4_APE, 7, rows, NULL));
    for (int row = 0; row < 4; row++) {
        ASSERT_MEM_EQ(dense + row * 48, apart + row * 53, 48 * sizeof *dense);
        if (row < 3) ASSERT(memory_untouched(apart + row * 53 + 48, 5 * sizeof *apart));
    }
    PASS();
}

TEST varying_hyper_parameters(void) {
    static const int64_t hidden_dims[] = {1, 7, 64, 300}, head_dims[] = {1, 2, 22, 64, 130}, ratios[] = {1, 2, 5, 32};
    for (int h = 0; h < 4; h++) {
        for (int d = 0; d < 5; d++) {
            for (int r = 0; r < 4; r++) {
                dsv4_config c = {.hidden_dim = hidden_dims[h], .head_dim = head_dims[d], .ratio = ratios[r]};
                c.overlap = (h + d + r) % 2;
                c.rope_dim = d % 2 ? c.head_dim / 2 * 2 : 0;
                const char *wrong = misshapen(&c, h % 2 ? DSV4_BF16 : DSV4_F32, 2, 3 * c.ratio);
                ASSERTm(note("H %d D %d m %d: %s", (int)c.hidden_dim, (int)c.head_dim, (int)c.ratio, wrong), !wrong);
            }
        }
    }
    PASS();
}

SUITE(seed) {
    RUN_TEST(csa_shapes);
    RUN_TEST(hca_shapes);
    RUN_TEST(csa_equivalence_with_pytorch);
    RUN_TEST(hca_equivalence_with_pytorch);
    RUN_TEST(extreme_batch_sizes);
    RUN_TEST(state_splitting);
    RUN_TEST(lengths_the_ratio_does_not_divide);
    RUN_TEST(reproducible_random_initialisation);
    RUN_TEST(initialisation_does_not_depend_on_the_array_being_larger);
    RUN_TEST(initialisation_does_not_depend_on_the_stride);
    RUN_TEST(varying_hyper_parameters);
}

TESTS_MAIN(seed);
