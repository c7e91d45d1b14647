/* The contract of each public function: what its results are, and what every kind of bad argument gets: its status, a
 * message with the numbers, and nothing written. */

#include <float.h>

#include "runner.h"
#include "oracle_support.h"
#include "workbench.h"

/* A failure as promised: that status, in the error too, with a text that names each of the given words. */
static const char *failure(dsv4_status wanted, dsv4_status got, const dsv4_error *error, const char *words) {
    char word[64];
    if (got != wanted)
        return note("status %d (%s), not %d: %.200s", (int)got, dsv4_status_text(got), (int)wanted, error->text);
    if (error->status != wanted) return note("error.status is %d", (int)error->status);
    if (error->text[0] == 0 || !memchr(error->text, 0, sizeof error->text)) return note("no message");
    for (int used = 0; sscanf(words, "%63s%n", word, &used) == 1; words += used)
        if (!strstr(error->text, word)) return note("\"%s\" is not in \"%.200s\"", word, error->text);
    return NULL;
}

#define ASSERT_FAILS(status, words, call)                               \
    do {                                                                \
        dsv4_error error;                                               \
        memset(&error, 0, sizeof error);                                \
        const dsv4_status got_status = (call);                          \
        const char *wrong = failure(status, got_status, &error, words); \
        ASSERTm(wrong, !wrong);                                         \
    } while (0)

/* An address that no number of `size` bytes may have. */
static void *crooked(void *pointer, size_t size) { return (char *)pointer + size / 2; }

/* ---- Status ------------------------------------------------------------------------------------------------ */

TEST every_status_has_a_text_of_its_own(void) {
    for (int i = 0; i < DSV4_STATUS_COUNT; i++) {
        const char *text = dsv4_status_text((dsv4_status)i);
        ASSERT(text && strlen(text) > 3 && strcmp(text, "unknown status") != 0);
        for (int k = 0; k < i; k++) ASSERT(strcmp(text, dsv4_status_text((dsv4_status)k)) != 0);
    }
    ASSERT_STR_EQ("success", dsv4_status_text(DSV4_OK));
    ASSERT_STR_EQ("a buffer is too small", dsv4_status_text(DSV4_ERROR_BUFFER));
    ASSERT_STR_EQ("unknown status", dsv4_status_text(DSV4_STATUS_COUNT));
    ASSERT_STR_EQ("unknown status", dsv4_status_text((dsv4_status)-1));
    ASSERT_STR_EQ("unknown status", dsv4_status_text((dsv4_status)1000));
    PASS();
}

TEST success_writes_no_error(void) {
    workbench w = workbench_new(&shapes[1], 2, 1);
    dsv4_error error, before;
    memset(&error, POISON, sizeof error);
    before = error;
    results r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, dsv4_config_check(&w.config, &error));
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, &error));
    ASSERT_MEM_EQ(&before, &error, sizeof error);
    workbench_free(&w);
    PASS();
}

/* ---- bf16 -------------------------------------------------------------------------------------------------- */

TEST dtypes_have_their_size(void) {
    ASSERT_EQ_FMT(4u, (unsigned)dsv4_dtype_size(DSV4_F32), "%u");
    ASSERT_EQ_FMT(2u, (unsigned)dsv4_dtype_size(DSV4_BF16), "%u");
    ASSERT_EQ_FMT(1u, (unsigned)dsv4_dtype_size(DSV4_PACKED), "%u");
    ASSERT_EQ_FMT(0u, (unsigned)dsv4_dtype_size((dsv4_dtype)4), "%u");
    ASSERT_EQ_FMT(0u, (unsigned)dsv4_dtype_size((dsv4_dtype)0), "%u");
    ASSERT_EQ_FMT(0u, (unsigned)dsv4_dtype_size((dsv4_dtype)-1), "%u");
    PASS();
}

TEST all_65536_bf16_numbers_are_widened_exactly_and_come_back(void) {
    for (uint32_t i = 0; i < 65536; i++) {
        float wide = dsv4_bf16_to_f32((dsv4_bf16)i);
        ASSERT_EQ_FMT((unsigned)(i << 16), (unsigned)bits_of_float(wide), "%#x");
        if (!isnan(wide)) ASSERT_EQ_FMT((unsigned)i, (unsigned)dsv4_bf16_from_f32(wide), "%#x");
    }
    PASS();
}

/* Around every bf16 number: just above it, just below, on, and just above the middle of its step, just below the
 * next. */
static const uint32_t lower_halves[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};

TEST rounding_is_to_nearest_with_ties_to_even(void) {
    for (uint32_t i = 0; i < 65536; i++) {
        for (int k = 0; k < 6; k++) {
            float value = float_of_bits(i << 16 | lower_halves[k]);
            dsv4_bf16 rounded = dsv4_bf16_from_f32(value);
            if (isnan(value)) {
                ASSERTm(note("%#x", (unsigned)bits_of_float(value)), (rounded & 0x7FC0) == 0x7FC0);
                ASSERT_EQ_FMT((unsigned)(i & 0x8000), (unsigned)(rounded & 0x8000), "%#x");
            } else {
                float expected = (float)oracle_bf16((double)value);
                ASSERT_EQ_FMT((unsigned)bits_of_float(expected), (unsigned)rounded << 16, "%#x");
            }
        }
    }
    PASS();
}

TEST numbers_beyond_the_largest_bf16_become_infinite(void) {
    static const struct {
        uint32_t value, rounded;
    } cases[] = {{0x7F7F0000, 0x7F7F}, {0x7F7F7FFF, 0x7F7F}, {0x7F7F8000, 0x7F80}, {0x7F7FFFFF, 0x7F80},
                 {0xFF7F7FFF, 0xFF7F}, {0xFF7F8000, 0xFF80}, {0x7F800000, 0x7F80}, {0xFF800000, 0xFF80},
                 {0x00000000, 0x0000}, {0x80000000, 0x8000}, {0x00008000, 0x0000}, {0x00018000, 0x0002},
                 {0x80000001, 0x8000}, {0x007FFFFF, 0x0080}, {0x7F800001, 0x7FC0}, {0xFFFFFFFF, 0xFFFF}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        ASSERT_EQ_FMT((unsigned)cases[i].rounded, (unsigned)dsv4_bf16_from_f32(float_of_bits(cases[i].value)), "%#x");
    PASS();
}

TEST arrays_are_converted_as_single_numbers_are(void) {
    enum { COUNT = 65536 * 6 };
    float *wide = reserve(COUNT * sizeof *wide), *back = reserve(COUNT * sizeof *back);
    dsv4_bf16 *narrow = reserve(COUNT * sizeof *narrow);
    for (uint32_t i = 0; i < COUNT; i++) wide[i] = float_of_bits(i / 6 << 16 | lower_halves[i % 6]);
    dsv4_bf16_from_f32_array(narrow, wide, COUNT);
    dsv4_bf16_to_f32_array(back, narrow, COUNT);
    for (uint32_t i = 0; i < COUNT; i++) {
        ASSERT_EQ_FMT((unsigned)dsv4_bf16_from_f32(wide[i]), (unsigned)narrow[i], "%#x");
        ASSERT_EQ_FMT((unsigned)narrow[i] << 16, (unsigned)bits_of_float(back[i]), "%#x");
    }
    free(narrow);
    free(back);
    free(wide);
    PASS();
}

/* Every length up to several vectors, beyond none or beyond so many that the CPU is asked for its best kernels, every
 * offset: exactly that many numbers are written. */
TEST arrays_of_any_length_at_any_offset_are_converted_within_bounds(size_t least) {
    enum { MANY = 20000, MOST = 80, OFFSETS = 17, ROOM = MANY + MOST + OFFSETS + 40 };
    static float wide[ROOM], back[ROOM];
    static dsv4_bf16 narrow[ROOM];
    ASSERT(least <= MANY);
    for (int i = 0; i < ROOM; i++) wide[i] = (float)(i + 1) * 1.00390625f;
    for (size_t count = least; count <= least + MOST; count++) {
        for (size_t offset = 0; offset<OFFSETS; offset += least> 0 ? 5 : 1) {
            memset(narrow, POISON, sizeof narrow);
            memset(back, POISON, sizeof back);
            dsv4_bf16_from_f32_array(narrow + offset, wide + offset, count);
            dsv4_bf16_to_f32_array(back + offset, narrow + offset, count);
            for (size_t i = 0; i < count; i++) {
                ASSERT_EQ(dsv4_bf16_from_f32(wide[offset + i]), narrow[offset + i]);
                ASSERT_EQ(dsv4_bf16_to_f32(narrow[offset + i]), back[offset + i]);
            }
            ASSERT(memory_untouched(narrow, offset * 2) && memory_untouched(back, offset * 4));
            ASSERT(memory_untouched(narrow + offset + count, (ROOM - offset - count) * 2));
            ASSERT(memory_untouched(back + offset + count, (ROOM - offset - count) * 4));
        }
    }
    PASS();
}

/* ---- Configuration ----------------------------------------------------------------------------------------- */

TEST presets_are_the_published_models(void) {
    static const struct {
        dsv4_preset preset;
        const char *name;
        int64_t hidden_dim, head_dim, ratio;
        int overlap, no_ape, no_gate;
        float eps;
    } rows[] = {
        {DSV4_V4_FLASH_CSA, "v4-flash-csa", 4096, 512, 4, 1, 0, 0, 1e-6f},
        {DSV4_V4_FLASH_HCA, "v4-flash-hca", 4096, 512, 128, 0, 0, 0, 1e-6f},
        {DSV4_V4_FLASH_INDEXER, "v4-flash-indexer", 4096, 128, 4, 1, 0, 0, 1e-6f},
        {DSV4_V4_PRO_CSA, "v4-pro-csa", 7168, 512, 4, 1, 0, 0, 1e-6f},
        {DSV4_V4_PRO_HCA, "v4-pro-hca", 7168, 512, 128, 0, 0, 0, 1e-6f},
        {DSV4_V4_PRO_INDEXER, "v4-pro-indexer", 7168, 128, 4, 1, 0, 0, 1e-6f},
        {DSV4_V41_FLASH_RATIO2, "v4.1-flash-ratio2", 5120, 512, 2, 0, 1, 0, 1e-20f},
        {DSV4_V41_FLASH_RATIO1, "v4.1-flash-ratio1", 5120, 512, 1, 0, 1, 1, 1e-20f},
    };
    ASSERT_EQ_FMT((int)(sizeof rows / sizeof *rows), (int)DSV4_PRESET_COUNT, "%d");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        dsv4_config c = dsv4_preset_config(rows[i].preset);
        ASSERT_STR_EQ(rows[i].name, dsv4_preset_name(rows[i].preset));
        ASSERT_EQ_FMT((int)rows[i].hidden_dim, (int)c.hidden_dim, "%d");
        ASSERT_EQ_FMT((int)rows[i].head_dim, (int)c.head_dim, "%d");
        ASSERT_EQ_FMT((int)rows[i].ratio, (int)c.ratio, "%d");
        ASSERT_EQ_FMT(64, (int)c.rope_dim, "%d");
        ASSERT_EQ_FMT(rows[i].overlap, c.overlap, "%d");
        ASSERT_EQ_FMT(rows[i].no_ape, c.no_ape, "%d");
        ASSERT_EQ_FMT(rows[i].no_gate, c.no_gate, "%d");
        ASSERT_EQ_FMT((unsigned)DSV4_ROUNDING_DEEPSEEK, (unsigned)c.rounding, "%#x");
        ASSERT_EQ_FMT((double)rows[i].eps, (double)c.eps, "%g");
        ASSERT_EQ_FMT(16.0, c.yarn_factor, "%g");
        ASSERT(c.rope_theta == 0 || c.rope_theta == 160000);
        ASSERT(c.yarn_orig_ctx == 0 || c.yarn_orig_ctx == 65536);
        ASSERT_EQ(DSV4_OK, dsv4_config_check(&c, NULL));
    }
    PASS();
}

TEST no_preset_is_a_zeroed_configuration_that_is_refused(void) {
    static const int values[] = {-1, DSV4_PRESET_COUNT, 1000};
    dsv4_config zero;
    memset(&zero, 0, sizeof zero);
    for (int i = 0; i < 3; i++) {
        dsv4_config c = dsv4_preset_config((dsv4_preset)values[i]);
        ASSERT_MEM_EQ(&zero, &c, sizeof c);
        ASSERT_EQ(NULL, dsv4_preset_name((dsv4_preset)values[i]));
        ASSERT_FAILS(DSV4_ERROR_CONFIG, "hidden_dim 0", dsv4_config_check(&c, &error));
    }
    PASS();
}

TEST rounding_presets_are_made_of_their_points(void) {
    ASSERT_EQ_FMT(0u, (unsigned)DSV4_ROUNDING_NONE, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_DEEPSEEK, (unsigned)DSV4_ROUNDING_DEEPSEEK, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_MAXTEXT, (unsigned)DSV4_ROUNDING_MAXTEXT, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_TRANSFORMERS, (unsigned)DSV4_ROUNDING_TRANSFORMERS, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_TRANSFORMERS_5_8, (unsigned)DSV4_ROUNDING_TRANSFORMERS_5_8, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_VLLM, (unsigned)DSV4_ROUNDING_VLLM, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_NEMO, (unsigned)DSV4_ROUNDING_NEMO, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_MEGATRON, (unsigned)DSV4_ROUNDING_MEGATRON, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_SCORE, (unsigned)DSV4_ROUND_SCORE, "%#x");
    ASSERT_EQ_FMT((unsigned)ORACLE_TRIG, (unsigned)DSV4_ROUND_TRIG, "%#x");
    PASS();
}

TEST every_rounding_has_a_name_that_reads_back(void) {
    char text[DSV4_ROUNDING_TEXT_SIZE];
    for (uint32_t bits = 0; bits < 1u << ROUNDING_POINTS; bits++) {
        uint32_t back = ~bits;
        ASSERT_EQ(DSV4_OK, dsv4_rounding_name(bits, text, sizeof text, NULL));
        ASSERT_EQ(DSV4_OK, dsv4_rounding_parse(text, &back, NULL));
        ASSERTm(note("%s", text), bits == back);
    }
    for (int i = 0; i < ROUNDING_COUNT; i++) {
        ASSERT_EQ(DSV4_OK, dsv4_rounding_name(roundings[i].bits, text, sizeof text, NULL));
        ASSERT_STR_EQ(roundings[i].name, text);
    }
    PASS();
}

TEST names_of_presets_and_points_can_be_joined(void) {
    static const struct {
        const char *text;
        uint32_t bits;
    } rows[] = {{"none", 0},
                {"row", DSV4_ROUND_ROW},
                {"vllm", DSV4_ROUND_ROW},
                {"pooled+scaled+row", DSV4_ROUNDING_DEEPSEEK},
                {"row+pooled+row", DSV4_ROUND_ROW | DSV4_ROUND_POOLED},
                {"transformers+score", DSV4_ROUNDING_TRANSFORMERS | DSV4_ROUND_SCORE},
                {"none+params", DSV4_ROUND_PARAMS}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint32_t bits = 1u << 31;
        ASSERT_EQ(DSV4_OK, dsv4_rounding_parse(rows[i].text, &bits, NULL));
        ASSERTm(rows[i].text, rows[i].bits == bits);
    }
    PASS();
}

TEST an_unknown_rounding_is_refused_and_the_known_ones_listed(void) {
    static const char *const texts[] = {"",     "+",    "deep",        "deepseekk", "Deepseek",
                                        "row+", "+row", "row++pooled", "row pooled"};
    uint32_t bits = 77;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "deepseek transformers-5.8 megatron projection row",
                     dsv4_rounding_parse(texts[i], &bits, &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "\"somethingthatisnotathing\";",
                 dsv4_rounding_parse("somethingthatisnotathing_atall_of_any_length", &bits, &error));
    ASSERT_EQ(DSV4_ERROR_NULL, dsv4_rounding_parse(NULL, &bits, NULL));
    ASSERT_EQ(DSV4_ERROR_NULL, dsv4_rounding_parse("row", NULL, NULL));
    ASSERT_EQ_FMT(77u, (unsigned)bits, "%u");
    PASS();
}

TEST a_name_that_does_not_fit_is_refused(void) {
    char text[DSV4_ROUNDING_TEXT_SIZE] = "", all[DSV4_ROUNDING_TEXT_SIZE];
    const uint32_t points = (1u << ROUNDING_POINTS) - 1;
    ASSERT_EQ(DSV4_OK, dsv4_rounding_name(points, all, sizeof all, NULL));
    const size_t needed = strlen(all) + 1;
    ASSERT_EQ(DSV4_OK, dsv4_rounding_name(points, text, needed, NULL));
    for (size_t size = 0; size < needed; size++)
        ASSERT_EQ(DSV4_ERROR_BUFFER, dsv4_rounding_name(points, text, size, NULL));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "0x800", dsv4_rounding_name(points + 1, text, sizeof text, &error));
    ASSERT_EQ(DSV4_ERROR_NULL, dsv4_rounding_name(0, NULL, 0, NULL));
    PASS();
}

/* name, what is set, the words its message must hold */
#define BAD_CONFIGS(X)                                                              \
    X(no_hidden_dim, c->hidden_dim = 0, "hidden_dim 0")                             \
    X(negative_hidden_dim, c->hidden_dim = -7, "hidden_dim -7")                     \
    X(huge_hidden_dim, c->hidden_dim = INT64_MAX, "9223372036854775807")            \
    X(no_head_dim, c->head_dim = 0, "head_dim 0")                                   \
    X(negative_head_dim, c->head_dim = -1, "head_dim -1")                           \
    X(huge_head_dim, c->head_dim = (int64_t)1 << 31, "2147483648")                  \
    X(no_ratio, c->ratio = 0, "ratio 0")                                            \
    X(negative_ratio, c->ratio = -4, "ratio -4")                                    \
    X(huge_ratio, c->ratio = (int64_t)1 << 40, "1099511627776")                     \
    X(odd_rope_dim, c->rope_dim = 7, "rope_dim 7")                                  \
    X(negative_rope_dim, c->rope_dim = -2, "rope_dim -2")                           \
    X(rope_dim_beyond_head_dim, c->rope_dim = 26, "rope_dim 26 24")                 \
    X(no_gate_with_a_window, c->no_gate = 1, "no_gate 8")                           \
    X(no_gate_with_overlap, (c->no_gate = 1, c->ratio = 1), "no_gate 2")            \
    X(no_gate_ratio_2, (c->no_gate = 1, c->ratio = 2, c->overlap = 0), "no_gate 2") \
    X(unknown_rounding, c->rounding = 2048, "rounding 0x800")                       \
    X(overlap_two, c->overlap = 2, "overlap 2")                                     \
    X(negative_overlap, c->overlap = -1, "overlap -1")                              \
    X(no_ape_two, c->no_ape = 2, "no_ape 2")                                        \
    X(negative_no_gate, c->no_gate = -1, "no_gate -1")                              \
    X(negative_eps, c->eps = -1e-6f, "eps -1e-06")                                  \
    X(nan_eps, c->eps = NAN, "eps nan")                                             \
    X(infinite_eps, c->eps = INFINITY, "eps inf")                                   \
    X(positive_pad_gate, c->pad_gate = 1, "pad_gate 1")                             \
    X(pad_gate_just_above_nought, c->pad_gate = 0.5f, "pad_gate 0.5")               \
    X(nan_pad_gate, c->pad_gate = NAN, "pad_gate nan")                              \
    X(unknown_sums, c->sums = (dsv4_sums)2, "sums 2 PAIRS TILES")                   \
    X(negative_sums, c->sums = (dsv4_sums)-1, "sums -1")                            \
    X(theta_one, c->rope_theta = 1, "rope_theta 1")                                 \
    X(negative_theta, c->rope_theta = -5, "rope_theta -5")                          \
    X(theta_beyond_range, c->rope_theta = 2e30, "rope_theta 2e+30")                 \
    X(nan_theta, c->rope_theta = NAN, "rope_theta nan")                             \
    X(infinite_theta, c->rope_theta = INFINITY, "rope_theta inf")                   \
    X(yarn_factor_below_1, c->yarn_factor = 0.5, "yarn_factor 0.5")                 \
    X(huge_yarn_factor, c->yarn_factor = 1e31, "yarn_factor 1e+31 most")            \
    X(nan_yarn_factor, c->yarn_factor = NAN, "yarn_factor nan")                     \
    X(yarn_ctx_below_1, c->yarn_orig_ctx = 0.5, "yarn_orig_ctx 0.5")                \
    X(negative_yarn_ctx, c->yarn_orig_ctx = -1, "yarn_orig_ctx -1")                 \
    X(negative_beta_fast, c->yarn_beta_fast = -1, "yarn_beta_fast -1")              \
    X(nan_beta_slow, c->yarn_beta_slow = NAN, "yarn_beta_slow nan")                 \
    X(negative_beta_slow, c->yarn_beta_slow = -3, "yarn_beta_slow -3")

#define SPOIL_CONFIG(name, code, words) \
    static void spoil_##name(dsv4_config *c) { (void)(code); }
BAD_CONFIGS(SPOIL_CONFIG)

static const struct bad_config {
    const char *name;
    void (*spoil)(dsv4_config *c);
    const char *words;
} bad_configs[] = {
#define BAD_CONFIG_ROW(name, code, words) {#name, spoil_##name, words},
    BAD_CONFIGS(BAD_CONFIG_ROW)};
enum { BAD_CONFIG_COUNT = sizeof bad_configs / sizeof *bad_configs };

/* ... by every function that takes one. */
TEST a_bad_configuration_is_refused_everywhere(const struct bad_config *bad) {
    workbench w = workbench_new(&shapes[1], 1, 2);
    dsv4_config c = w.config;
    bad->spoil(&c);
    dsv4_allocator heap = dsv4_heap();
    dsv4_compressor *compressor = (dsv4_compressor *)&heap;
    dsv4_param_info info[DSV4_PARAM_COUNT];
    float numbers[16];
    size_t bytes = 12345;
    memset(info, POISON, sizeof info);
    memset(numbers, POISON, sizeof numbers);
    ASSERT_FAILS(DSV4_ERROR_CONFIG, bad->words, dsv4_config_check(&c, &error));
    ASSERT_FAILS(DSV4_ERROR_CONFIG, bad->words, dsv4_config_params(&c, info, &error));
    ASSERT_FAILS(DSV4_ERROR_CONFIG, bad->words,
                 dsv4_param_init(&c, DSV4_NORM, 1, matrix_of(numbers, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_CONFIG, bad->words, dsv4_rope_frequencies(&c, numbers, 16, &error));
    ASSERT_FAILS(DSV4_ERROR_CONFIG, bad->words, dsv4_compressor_size(&c, &w.m.params, NULL, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_CONFIG, bad->words,
                 dsv4_compressor_create(&c, &w.m.params, NULL, &heap, &compressor, &error));
    ASSERT_EQ(DSV4_ERROR_CONFIG, dsv4_config_check(&c, NULL));
    ASSERT(memory_untouched(info, sizeof info) && memory_untouched(numbers, sizeof numbers));
    ASSERT_EQ_FMT(12345u, (unsigned)bytes, "%u");
    ASSERT_EQ((void *)&heap, (void *)compressor);
    workbench_free(&w);
    PASS();
}

/* Values on the allowed side of each bound. */
#define BORDER_CONFIGS(X)                                                            \
    X(theta_above_one, c->rope_theta = 1.0000001)                                    \
    X(largest_theta, c->rope_theta = 1e30)                                           \
    X(yarn_factor_one, c->yarn_factor = 1)                                           \
    X(yarn_ctx_one, c->yarn_orig_ctx = 1)                                            \
    X(small_beta, c->yarn_beta_slow = 1e-30)                                         \
    X(smallest_eps, c->eps = FLT_MIN)                                                \
    X(pad_just_below_nought, c->pad_gate = -FLT_MIN)                                 \
    X(infinite_pad, c->pad_gate = -INFINITY)                                         \
    X(sums_of_tiles, c->sums = DSV4_SUMS_TILES)                                      \
    X(rope_over_all, c->rope_dim = c->head_dim)                                      \
    X(all_rounding, c->rounding = 2047)                                              \
    X(largest_ratio, c->ratio = INT32_MAX)                                           \
    X(largest_hidden_dim, c->hidden_dim = INT32_MAX)                                 \
    X(largest_head_dim, c->head_dim = INT32_MAX)                                     \
    X(smallest, (c->hidden_dim = 1, c->head_dim = 1, c->ratio = 1, c->rope_dim = 0)) \
    X(no_gate_alone, (c->no_gate = 1, c->ratio = 1, c->overlap = 0))
#define BORDER_CONFIG(name, code) \
    static void border_##name(dsv4_config *c) { (void)(code); }
BORDER_CONFIGS(BORDER_CONFIG)

TEST configurations_on_the_border_are_accepted(void) {
    static const struct {
        const char *name;
        void (*set)(dsv4_config *c);
    } borders[] = {
#define BORDER_CONFIG_ROW(name, code) {#name, border_##name},
        BORDER_CONFIGS(BORDER_CONFIG_ROW)};
    for (size_t i = 0; i < sizeof borders / sizeof *borders; i++) {
        dsv4_config c = shapes[1].config;
        dsv4_error error = {0};
        borders[i].set(&c);
        ASSERTm(note("%s: %.200s", borders[i].name, error.text), dsv4_config_check(&c, &error) == DSV4_OK);
    }
    PASS();
}

TEST a_zero_field_takes_its_default(void) {
    dsv4_config c = shapes[1].config, full = c;
    c.yarn_factor = 0;
    full.eps = 1e-6f;
    full.pad_gate = -INFINITY;
    full.rope_theta = 160000;
    full.yarn_factor = 1;
    full.yarn_orig_ctx = 65536;
    full.yarn_beta_fast = 32;
    full.yarn_beta_slow = 1;
    workbench w = workbench_for(&c, DSV4_F32, 0, 1);
    const dsv4_config *got = dsv4_compressor_config(w.e.compressor);
    ASSERT(got->sums == full.sums && got->rounding == full.rounding && got->eps == full.eps &&
           got->pad_gate == full.pad_gate && got->rope_theta == full.rope_theta &&
           got->yarn_factor == full.yarn_factor && got->yarn_orig_ctx == full.yarn_orig_ctx &&
           got->yarn_beta_fast == full.yarn_beta_fast && got->yarn_beta_slow == full.yarn_beta_slow);
    ASSERT_MEM_EQ(&full, got, offsetof(dsv4_config, rounding));
    workbench_free(&w);
    PASS();
}

TEST parameters_are_listed_by_configuration(void) {
    for (int i = 0; i < SHAPE_COUNT; i++) {
        dsv4_config c = shapes[i].config;
        dsv4_param_info info[DSV4_PARAM_COUNT];
        int64_t columns = c.head_dim * (c.overlap ? 2 : 1);
        ASSERT_EQ(DSV4_OK, dsv4_config_params(&c, info, NULL));
        const int64_t expected[DSV4_PARAM_COUNT][2] = {{columns, c.hidden_dim},
                                                       {c.no_gate ? 0 : columns, c.no_gate ? 0 : c.hidden_dim},
                                                       {c.no_ape ? 0 : c.ratio, c.no_ape ? 0 : columns},
                                                       {1, c.head_dim}};
        static const char *const names[] = {"wkv", "wgate", "ape", "norm"};
        for (int p = 0; p < DSV4_PARAM_COUNT; p++) {
            ASSERT_STR_EQ(names[p], info[p].name);
            ASSERT_EQ_FMT((int)expected[p][0], (int)info[p].rows, "%d");
            ASSERT_EQ_FMT((int)expected[p][1], (int)info[p].columns, "%d");
            ASSERT_EQ_FMT((int)(expected[p][0] * expected[p][1]), (int)info[p].count, "%d");
        }
    }
    PASS();
}

TEST parameter_functions_check_their_arguments(void) {
    dsv4_config c = shapes[1].config, v41 = shapes[11].config;
    dsv4_param_info info[DSV4_PARAM_COUNT];
    float data[64];
    memset(data, POISON, sizeof data);
    ASSERT_FAILS(DSV4_ERROR_NULL, "config", dsv4_config_check(NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "config", dsv4_config_params(NULL, info, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "info", dsv4_config_params(&c, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "config", dsv4_param_init(NULL, DSV4_NORM, 1, matrix_of(data, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "norm", dsv4_param_init(&c, DSV4_NORM, 1, matrix_of(NULL, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ALIGNMENT, "norm 4",
                 dsv4_param_init(&c, DSV4_NORM, 1, matrix_of(crooked(data, 4), DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ALIGNMENT, "norm 2",
                 dsv4_param_init(&c, DSV4_NORM, 1, matrix_of(crooked(data, 2), DSV4_BF16), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "dtype 9",
                 dsv4_param_init(&c, DSV4_NORM, 1, matrix_of(data, (dsv4_dtype)9), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "4", dsv4_param_init(&c, DSV4_PARAM_COUNT, 1, matrix_of(data, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "-1", dsv4_param_init(&c, (dsv4_param)-1, 1, matrix_of(data, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "2", dsv4_param_init(&v41, DSV4_APE, 1, matrix_of(data, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "1", dsv4_param_init(&v41, DSV4_WGATE, 1, matrix_of(data, DSV4_F32), &error));
    ASSERT(memory_untouched(data, sizeof data));
    PASS();
}

/* ---- RoPE's numbers ---------------------------------------------------------------------------------------- */

/* Both the power and its reciprocal correctly rounded, and YaRN's mixture operation by operation in fp32. */
TEST frequencies_are_correctly_rounded(void) {
    dice d = {1};
    for (int i = 0; i < 400; i++) {
        dsv4_config c = {.hidden_dim = 1, .ratio = 1};
        c.rope_dim = i < 4 ? 64 : 2 * (1 + dice_below(&d, 128));
        c.head_dim = c.rope_dim;
        c.rope_theta = i < 4 ? 0 : (double)(2 + dice_below(&d, 2000000)) + (double)dice_below(&d, 8) / 8;
        if (i % 2) {
            c.yarn_factor = i < 4 ? 16 : (double)(1 + dice_below(&d, 200)) / 4 + 1;
            c.yarn_orig_ctx = i < 4 ? 0 : (double)(1 << dice_below(&d, 18));
        }
        oracle_config oc = oracle_config_of(&c);
        double expected[128];
        float got[129];
        memset(got, POISON, sizeof got);
        oracle_frequencies(&oc, expected);
        ASSERT_EQ(DSV4_OK, dsv4_rope_frequencies(&c, got, c.rope_dim / 2, NULL));
        for (int64_t k = 0; k < c.rope_dim / 2; k++)
            ASSERTm(note("R %d theta %g yarn %g ctx %g pair %d: %.9g, not %.9g", (int)c.rope_dim, c.rope_theta,
                         c.yarn_factor, c.yarn_orig_ctx, (int)k, (double)got[k], expected[k]),
                    (double)got[k] == expected[k]);
        ASSERT(memory_untouched(got + c.rope_dim / 2, sizeof *got));
    }
    PASS();
}

/* Settings far from any model's: the ramp lies beyond all pairs, or before them. Where the base is next to 1 the ramp
 * begins and ends at numbers of no meaning: there each frequency must still lie between the plain one and its 16th. */
TEST frequencies_of_wild_settings_are_those_of_the_formula(void) {
    static const double thetas[] = {1 + 1e-12, 1.5, 1e30}, contexts[] = {1, 1e30}, betas[] = {1e-30, 1, 1e30};
    for (int i = 0; i < 3 * 2 * 3 * 3; i++) {
        dsv4_config c = {.hidden_dim = 1, .head_dim = 16, .ratio = 1, .rope_dim = 16, .yarn_factor = 16};
        c.rope_theta = thetas[i % 3];
        c.yarn_orig_ctx = contexts[i / 3 % 2];
        c.yarn_beta_fast = betas[i / 6 % 3];
        c.yarn_beta_slow = betas[i / 18];
        oracle_config oc = oracle_config_of(&c);
        double expected[8];
        float got[8];
        oracle_frequencies(&oc, expected);
        ASSERT_EQ(DSV4_OK, dsv4_rope_frequencies(&c, got, 8, NULL));
        for (int k = 0; k < 8; k++) {
            if (c.rope_theta < 1.1)
                ASSERT(got[k] <= 1 && got[k] >= 0.0624f);
            else
                ASSERTm(note("theta %g ctx %g betas %g %g pair %d: %.9g, not %.9g", c.rope_theta, c.yarn_orig_ctx,
                             c.yarn_beta_fast, c.yarn_beta_slow, k, (double)got[k], expected[k]),
                        (double)got[k] == expected[k]);
        }
    }
    PASS();
}

TEST frequencies_check_their_arguments(void) {
    dsv4_config c = shapes[1].config, no_rope = c;
    float got[8];
    no_rope.rope_dim = 0;
    memset(got, POISON, sizeof got);
    ASSERT_FAILS(DSV4_ERROR_NULL, "config", dsv4_rope_frequencies(NULL, got, 8, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "inv_freq", dsv4_rope_frequencies(&c, NULL, 8, &error));
    ASSERT_FAILS(DSV4_ERROR_ALIGNMENT, "inv_freq 4", dsv4_rope_frequencies(&c, crooked(got, 4), 7, &error));
    ASSERT_FAILS(DSV4_ERROR_BUFFER, "3 4", dsv4_rope_frequencies(&c, got, 3, &error));
    ASSERT_FAILS(DSV4_ERROR_BUFFER, "-1 4", dsv4_rope_frequencies(&c, got, -1, &error));
    ASSERT(memory_untouched(got, sizeof got));
    ASSERT_EQ(DSV4_OK, dsv4_rope_frequencies(&c, got, 4, NULL));
    ASSERT_EQ(DSV4_OK, dsv4_rope_frequencies(&no_rope, NULL, 0, NULL));
    PASS();
}

/* Steps of fp32 between a result and the exact value. */
static double steps_off(float got, double exact) {
    int exponent;
    frexp(exact, &exponent);
    return fabs((double)got - exact) / ldexp(1, exponent - 24);
}

TEST cos_and_sin_are_within_one_step(void) {
    static const double turns[] = {1, 2, 3, 4, 5, 7, 100, 1001, 65536, 1048576};
    dice d = {2};
    double worst = 0;
    for (int i = 0; i < 300000; i++) {
        float angle, cosine, sine;
        if (i < 100000)
            angle = float_of_bits((uint32_t)dice_next(&d) & 0x7FFFFFFF); /* any magnitude */
        else if (i < 200000)
            angle = (float)(dice_below(&d, 1048576) * (1 + dice_below(&d, 2048))); /* up to 2^31 */
        else
            angle = (float)(turns[i % 10] * 1.5707963267948966 * (double)(1 + dice_below(&d, 64))); /* next to a zero */
        if (!isfinite(angle)) continue;
        dsv4_cos_sin(angle, &cosine, &sine);
        worst = fmax(worst, fmax(steps_off(cosine, cos((double)angle)), steps_off(sine, sin((double)angle))));
        ASSERTm(note("cos, sin of %.9g are %.9g, %.9g, off by %.3g steps", (double)angle, (double)cosine, (double)sine,
                     worst),
                worst <= 1);
    }
    PASS();
}

/* Angles whose sine all but falls in the middle between two numbers of fp32, so that every term of the series
 * counts. */
TEST the_hardest_sines_are_correctly_rounded(void) {
    static const struct {
        uint32_t angle;
        float sine;
    } cases[] = {{0x401f2100u, 0.609320581f}, {0x43e423f5u, -0.681623757f}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float cosine, sine;
        dsv4_cos_sin(float_of_bits(cases[i].angle), &cosine, &sine);
        ASSERT_EQ_FMT((double)cases[i].sine, (double)sine, "%.9g");
    }
    PASS();
}

TEST cos_and_sin_of_special_angles(void) {
    static const float none[] = {-1e-9f, -1, -INFINITY, INFINITY, NAN};
    float cosine, sine;
    dsv4_cos_sin(0, &cosine, &sine);
    ASSERT_EQ_FMT(1.0f, cosine, "%g");
    ASSERT_EQ_FMT(0x00000000u, (unsigned)bits_of_float(sine), "%#x");
    dsv4_cos_sin(FLT_MAX, &cosine, &sine);
    ASSERT_IN_RANGE(cos((double)FLT_MAX), (double)cosine, 1e-7);
    ASSERT_IN_RANGE(sin((double)FLT_MAX), (double)sine, 1e-7);
    for (int i = 0; i < 5; i++) {
        dsv4_cos_sin(none[i], &cosine, &sine);
        ASSERT(isnan(cosine) && isnan(sine));
    }
    PASS();
}

/* Entries at positions where fp32 counts in twos, in thousands, and not at all. */
TEST rope_is_right_at_any_position(void) {
    static const int64_t positions[] = {0,          1048575,    1048576,    16777216,         16777219,
                                        2147483647, 2147483648, 4294967297, (int64_t)1 << 40, ((int64_t)1 << 50) + 3};
    for (size_t i = 0; i < sizeof positions / sizeof *positions; i++) {
        for (int of = 0; of < 3; of++) {
            workbench w = workbench_new(&shapes[of == 0 ? 1 : of == 1 ? 5 : 8], 3, 3);
            results r = workbench_results_in(&w, DSV4_F32);
            w.s.position = positions[i];
            ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, NULL));
            stray_number v = oracle_judge(&w.m, &w.s, &r);
            ASSERTm(note("position %lld: %s[%d] is %.9g", (long long)positions[i], stage_name(v.stage), (int)v.index,
                         v.got),
                    v.stage == STAGE_COUNT);
            workbench_free(&w);
        }
    }
    PASS();
}

/* ---- Memory ------------------------------------------------------------------------------------------------ */

TEST the_heap_aligns_and_frees(void) {
    dsv4_allocator heap = dsv4_heap();
    for (size_t alignment = 1; alignment <= 4096; alignment *= 2) {
        unsigned char *block = heap.alloc(heap.context, alignment + 3, alignment);
        ASSERT(block && (uintptr_t)block % alignment == 0);
        memset(block, POISON, alignment + 3);
        heap.free(heap.context, block, alignment + 3);
    }
    ASSERT_EQ(NULL, heap.alloc(heap.context, SIZE_MAX - 8, 64));
#ifndef TESTS_SANITIZED
    ASSERT_EQ(NULL, heap.alloc(heap.context, SIZE_MAX / 2 - 4096, 64)); /* what malloc itself refuses */
#endif
    PASS();
}

TEST an_arena_lays_blocks_one_after_another(void) {
    static unsigned char buffer[1024];
    unsigned char *base = buffer + (64 - (uintptr_t)buffer % 64) % 64;
    dsv4_arena arena = dsv4_arena_init(base, 192);
    dsv4_allocator a = dsv4_arena_allocator(&arena);
    unsigned char *first = a.alloc(a.context, 10, 64), *second = a.alloc(a.context, 64, 64);
    ASSERT_EQ((void *)base, (void *)first);
    ASSERT_EQ((void *)(base + 64), (void *)second);
    ASSERT_EQ(NULL, a.alloc(a.context, 65, 64));
    unsigned char *third = a.alloc(a.context, 64, 64);
    ASSERT_EQ((void *)(base + 128), (void *)third);
    ASSERT_EQ(NULL, a.alloc(a.context, 1, 1));
    a.free(a.context, first, 10); /* not the last: its room stays taken */
    ASSERT_EQ(NULL, a.alloc(a.context, 1, 1));
    a.free(a.context, third, 64);
    ASSERT_EQ((void *)(base + 128), a.alloc(a.context, 3, 1));
    ASSERT_EQ((void *)(base + 131), a.alloc(a.context, 1, 1));
    ASSERT_EQ((void *)(base + 136), a.alloc(a.context, 1, 8));
    ASSERT_EQ(NULL, a.alloc(a.context, SIZE_MAX, 1));
    ASSERT_EQ(NULL, a.alloc(a.context, SIZE_MAX - 60, 64));

    dsv4_arena crooked_arena = dsv4_arena_init(base + 1, 191);
    a = dsv4_arena_allocator(&crooked_arena);
    ASSERT_EQ((void *)(base + 64), a.alloc(a.context, 128, 64));
    dsv4_arena small = dsv4_arena_init(base + 1, 62); /* too small to reach an aligned address */
    a = dsv4_arena_allocator(&small);
    ASSERT_EQ(NULL, a.alloc(a.context, 1, 64));
    dsv4_arena none = dsv4_arena_init(NULL, 0);
    a = dsv4_arena_allocator(&none);
    ASSERT_EQ(NULL, a.alloc(a.context, 1, 1));
    a = dsv4_arena_allocator(NULL);
    ASSERT_EQ(NULL, a.alloc(a.context, 1, 1));
    PASS();
}

/* A compressor, workspace and state in one buffer of exactly the sizes that were named; one byte less does not do. */
TEST an_arena_of_exactly_the_sizes_named_holds_everything(const shape *of) {
    workbench w = workbench_new(of, 3, 4);
    size_t sizes[3], sum = 0;
    ASSERT_EQ(DSV4_OK, dsv4_compressor_size(&w.config, &w.m.params, NULL, &sizes[0], NULL));
    ASSERT_EQ(DSV4_OK, dsv4_workspace_size(w.e.compressor, 1, &sizes[1], NULL));
    ASSERT_EQ(DSV4_OK, dsv4_state_size(w.e.compressor, 2, &sizes[2], NULL));
    for (int i = 0; i < 3; i++) sum += (sizes[i] + 63) / 64 * 64;
    unsigned char *memory = workbench_memory(&w, sum + 128), *base = memory + (64 - (uintptr_t)memory % 64) % 64;
    for (size_t missing = 0; missing <= 64 - (64 - sizes[2] % 64) % 64; missing++) {
        dsv4_arena arena = dsv4_arena_init(base, sum - missing - (64 - sizes[2] % 64) % 64);
        dsv4_allocator a = dsv4_arena_allocator(&arena);
        engine e = {0};
        dsv4_state *state = NULL;
        memset(base, POISON, sum);
        ASSERT_EQ(DSV4_OK, dsv4_compressor_create(&w.config, &w.m.params, NULL, &a, &e.compressor, NULL));
        ASSERT_EQ(DSV4_OK, dsv4_workspace_create(e.compressor, NULL, &a, &e.workspace, NULL));
        if (missing) {
            char bytes[32];
            snprintf(bytes, sizeof bytes, "%u", (unsigned)sizes[2]);
            ASSERT_FAILS(DSV4_ERROR_MEMORY, bytes, dsv4_state_create(e.compressor, 2, &a, &state, &error));
            ASSERT_EQ(NULL, state);
        } else {
            results r = workbench_results(&w);
            ASSERT_EQ(DSV4_OK, dsv4_state_create(e.compressor, 2, &a, &state, NULL));
            ASSERT_EQ(DSV4_OK, compress_part(&e, &w.s, &r, state, 0, w.s.tokens, NULL));
            ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
            dsv4_state_destroy(state);
        }
        engine_free(&e);
        ASSERT_EQ_FMT(0u, (unsigned)arena.used, "%u");
    }
    workbench_free(&w);
    PASS();
}

/* ---- Creating and destroying ------------------------------------------------------------------------------- */

#define BAD_PARAMS(X)                                                                                  \
    X(no_wkv, p->wkv.data = NULL, DSV4_ERROR_NULL, "wkv")                                              \
    X(no_wgate, p->wgate.data = NULL, DSV4_ERROR_NULL, "wgate")                                        \
    X(no_ape, p->ape.data = NULL, DSV4_ERROR_NULL, "ape")                                              \
    X(no_norm, p->norm.data = NULL, DSV4_ERROR_NULL, "norm")                                           \
    X(crooked_wkv, p->wkv.data = (const char *)p->wkv.data + 2, DSV4_ERROR_ALIGNMENT, "wkv 4")         \
    X(crooked_wgate, p->wgate.data = (const char *)p->wgate.data + 1, DSV4_ERROR_ALIGNMENT, "wgate 4") \
    X(crooked_ape, p->ape.data = (const char *)p->ape.data + 3, DSV4_ERROR_ALIGNMENT, "ape 4")         \
    X(crooked_norm, p->norm.data = (const char *)p->norm.data + 2, DSV4_ERROR_ALIGNMENT, "norm 4")     \
    X(dtype_of_wkv, p->wkv.dtype = (dsv4_dtype)5, DSV4_ERROR_ARGUMENT, "wkv 5")                        \
    X(dtype_of_wgate, p->wgate.dtype = (dsv4_dtype)-3, DSV4_ERROR_ARGUMENT, "wgate -3")                \
    X(dtype_of_ape, p->ape.dtype = (dsv4_dtype)3, DSV4_ERROR_ARGUMENT, "ape 3")                        \
    X(dtype_of_norm, p->norm.dtype = (dsv4_dtype)7, DSV4_ERROR_ARGUMENT, "norm 7")
#define SPOIL_PARAMS(name, code, status, words) \
    static void params_##name(dsv4_params *p) { (void)(code); }
BAD_PARAMS(SPOIL_PARAMS)

static const struct bad_params {
    const char *name;
    void (*spoil)(dsv4_params *p);
    dsv4_status status;
    const char *words;
} bad_params[] = {
#define BAD_PARAMS_ROW(name, code, status, words) {#name, params_##name, status, words},
    BAD_PARAMS(BAD_PARAMS_ROW)};
enum { BAD_PARAMS_COUNT = sizeof bad_params / sizeof *bad_params };

TEST bad_parameters_are_refused(const struct bad_params *bad) {
    workbench w = workbench_new(&shapes[1], 1, 5);
    ledger l = {0};
    dsv4_allocator a = ledger_allocator(&l);
    dsv4_params params = w.m.params;
    dsv4_compressor *compressor = NULL;
    size_t bytes = 12345;
    bad->spoil(&params);
    ASSERT_FAILS(bad->status, bad->words, dsv4_compressor_size(&w.config, &params, NULL, &bytes, &error));
    ASSERT_FAILS(bad->status, bad->words, dsv4_compressor_create(&w.config, &params, NULL, &a, &compressor, &error));
    ASSERT_EQ_FMT(12345u, (unsigned)bytes, "%u");
    ASSERT_EQ(NULL, compressor);
    ASSERT_EQ_FMT(0, (int)l.calls, "%d");
    workbench_free(&w);
    PASS();
}

TEST parameters_the_configuration_lacks_must_not_be_given(void) {
    workbench w = workbench_new(&shapes[11], 1, 6); /* neither ape nor gate */
    dsv4_params params = w.m.params;
    size_t bytes = 0;
    params.ape = params.norm;
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "ape", dsv4_compressor_size(&w.config, &params, NULL, &bytes, &error));
    params = w.m.params;
    params.wgate = params.wkv;
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "wgate", dsv4_compressor_size(&w.config, &params, NULL, &bytes, &error));
    workbench_free(&w);
    PASS();
}

/* Weights in panels of 32 columns and of pairs of terms, ape, norm and frequencies in fp32, and half a kilobyte. The
 * panels are as large again with training, there in panels of 32 hidden columns. */
TEST a_compressor_takes_little_more_than_its_weights(const struct shape *of) {
    const dsv4_config c = of->config;
    const int64_t series = of->config.overlap ? 2 : 1, groups = (c.head_dim + 31) / 32, columns = series * c.head_dim;
    int64_t width = of->param[DSV4_WKV] == DSV4_BF16 ? 2 : 4;
    if (!of->config.no_gate) width += of->param[DSV4_WGATE] == DSV4_BF16 ? 2 : 4;
    const int64_t panels = groups * 32 * series * ((c.hidden_dim + 1) / 2 * 2) * width;
    const int64_t back = (c.hidden_dim + 31) / 32 * 32 * ((columns + 1) / 2 * 2) * width;
    const int64_t vectors = ((of->config.no_ape ? 0 : c.ratio) * columns + c.head_dim + c.rope_dim / 2) * 4;
    model m = shape_model(of, 20);
    for (int training = 0; training < 2; training++) {
        dsv4_options options = {NULL, training, 0};
        const int64_t bound = panels + (training ? back : 0) + vectors + 512;
        size_t bytes = 0;
        ASSERT_EQ(DSV4_OK, dsv4_compressor_size(&c, &m.params, &options, &bytes, NULL));
        ASSERTm(note("%d bytes, bound %d", (int)bytes, (int)bound), (int64_t)bytes <= bound);
    }
    model_free(&m);
    PASS();
}

/* So that in an arena one follows another without a gap. */
TEST every_object_ends_where_the_next_may_begin(const struct shape *of) {
    workbench w = workbench_new(of, 1, 21);
    size_t bytes[3];
    ASSERT_EQ(DSV4_OK, dsv4_compressor_size(&w.config, &w.m.params, NULL, &bytes[0], NULL));
    ASSERT_EQ(DSV4_OK, dsv4_workspace_size(w.e.compressor, 3, &bytes[1], NULL));
    ASSERT_EQ(DSV4_OK, dsv4_state_size(w.e.compressor, 1, &bytes[2], NULL));
    for (int i = 0; i < 3; i++) ASSERT_EQ_FMT(0, (int)(bytes[i] % DSV4_ALIGNMENT), "%d");
    workbench_free(&w);
    PASS();
}

static void *crooked_alloc(void *context, size_t size, size_t alignment) {
    unsigned char *block = ledger_alloc(context, size + alignment, alignment);
    return block + 8;
}
static void crooked_free(void *context, void *pointer, size_t size) {
    ledger_free(context, (unsigned char *)pointer - 8, size + DSV4_ALIGNMENT);
}

TEST creating_checks_its_arguments(void) {
    workbench w = workbench_new(&shapes[1], 1, 7);
    ledger l = {0};
    const dsv4_allocator good = ledger_allocator(&l), no_alloc = {NULL, ledger_free, &l};
    const dsv4_allocator no_free = {ledger_alloc, NULL, &l}, bent = {crooked_alloc, crooked_free, &l};
    dsv4_options unknown = {0};
    unknown.isa = "avx1024";
    const dsv4_config *c = &w.config;
    const dsv4_params *p = &w.m.params;
    dsv4_compressor *compressor = NULL, *of = w.e.compressor;
    dsv4_workspace *workspace = NULL;
    dsv4_state *state = NULL;
    size_t bytes = 12345;

    ASSERT_FAILS(DSV4_ERROR_NULL, "config", dsv4_compressor_size(NULL, p, NULL, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "params", dsv4_compressor_size(c, NULL, NULL, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "bytes", dsv4_compressor_size(c, p, NULL, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_ISA, "avx1024", dsv4_compressor_size(c, p, &unknown, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "config", dsv4_compressor_create(NULL, p, NULL, &good, &compressor, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "params", dsv4_compressor_create(c, NULL, NULL, &good, &compressor, &error));
    ASSERT_FAILS(DSV4_ERROR_ISA, "avx1024", dsv4_compressor_create(c, p, &unknown, &good, &compressor, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "compressor", dsv4_compressor_create(c, p, NULL, &good, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "allocator", dsv4_compressor_create(c, p, NULL, NULL, &compressor, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "alloc", dsv4_compressor_create(c, p, NULL, &no_alloc, &compressor, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "free", dsv4_compressor_create(c, p, NULL, &no_free, &compressor, &error));

    ASSERT_FAILS(DSV4_ERROR_NULL, "compressor", dsv4_workspace_size(NULL, 1, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "bytes", dsv4_workspace_size(of, 1, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "compressor", dsv4_workspace_create(NULL, NULL, &good, &workspace, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "workspace", dsv4_workspace_create(of, NULL, &good, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "allocator", dsv4_workspace_create(of, NULL, NULL, &workspace, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "alloc", dsv4_workspace_create(of, NULL, &no_alloc, &workspace, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "free", dsv4_workspace_create(of, NULL, &no_free, &workspace, &error));

    ASSERT_FAILS(DSV4_ERROR_NULL, "compressor", dsv4_state_size(NULL, 0, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "bytes", dsv4_state_size(of, 0, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "depth -1", dsv4_state_size(of, -1, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_OVERFLOW, "", dsv4_state_size(of, INT64_MAX / 8, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "depth 9223372036854775807", dsv4_state_size(of, INT64_MAX, &bytes, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "compressor", dsv4_state_create(NULL, 0, &good, &state, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "state", dsv4_state_create(of, 0, &good, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "allocator", dsv4_state_create(of, 0, NULL, &state, &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "depth -5", dsv4_state_create(of, -5, &good, &state, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "alloc", dsv4_state_create(of, 0, &no_alloc, &state, &error));
    ASSERT_EQ_FMT(0, (int)l.calls, "%d");

    ASSERT_FAILS(DSV4_ERROR_ALIGNMENT, "64", dsv4_compressor_create(c, p, NULL, &bent, &compressor, &error));
    ASSERT_FAILS(DSV4_ERROR_ALIGNMENT, "64", dsv4_workspace_create(of, NULL, &bent, &workspace, &error));
    ASSERT_FAILS(DSV4_ERROR_ALIGNMENT, "64", dsv4_state_create(of, 0, &bent, &state, &error));
    ASSERT_EQ_FMT(0, (int)l.live, "%d");
    ASSERT_FALSE(l.wrong);
    ASSERT(!compressor && !workspace && !state);
    ASSERT_EQ_FMT(12345u, (unsigned)bytes, "%u");
    workbench_free(&w);
    PASS();
}

TEST an_allocator_that_fails_leaves_nothing_behind(void) {
    workbench w = workbench_new(&shapes[0], 1, 8);
    for (int64_t fail_at = 1; fail_at <= 4; fail_at++) {
        ledger l = {0};
        l.fail_at = fail_at;
        dsv4_allocator a = ledger_allocator(&l);
        dsv4_compressor *compressor = NULL;
        dsv4_workspace *workspace = NULL;
        dsv4_state *state = NULL;
        dsv4_status expected = fail_at == 1 ? DSV4_ERROR_MEMORY : DSV4_OK;
        ASSERT_EQ(expected, dsv4_compressor_create(&w.config, &w.m.params, NULL, &a, &compressor, NULL));
        ASSERT_EQ(fail_at == 1, compressor == NULL);
        if (compressor) {
            expected = fail_at == 2 ? DSV4_ERROR_MEMORY : DSV4_OK;
            ASSERT_EQ(expected, dsv4_workspace_create(compressor, NULL, &a, &workspace, NULL));
            ASSERT_EQ(fail_at == 2, workspace == NULL);
            expected = fail_at == 3 ? DSV4_ERROR_MEMORY : DSV4_OK;
            ASSERT_EQ(expected, dsv4_state_create(compressor, 1, &a, &state, NULL));
            ASSERT_EQ(fail_at == 3, state == NULL);
        }
        dsv4_state_destroy(state);
        dsv4_workspace_destroy(workspace);
        dsv4_compressor_destroy(compressor);
        ASSERT_EQ_FMT(0, (int)l.live, "%d");
        ASSERT_FALSE(l.wrong);
    }
    workbench_free(&w);
    PASS();
}

/* Of each parameter, of what dsv4_param_init fills and of a mask. (x, out: BAD_CALLS; gradients: test_gradients.) */
TEST a_dtype_that_is_not_given_is_refused(void) {
    workbench w = workbench_new(&shapes[1], 1, 6);
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        dsv4_params params = w.m.params;
        size_t bytes = 0;
        char words[64];
        model_array(&params, i)->dtype = (dsv4_dtype)0;
        snprintf(words, sizeof words, "dtype of %s is not given", w.m.info[i].name);
        ASSERT_FAILS(DSV4_ERROR_ARGUMENT, words, dsv4_compressor_size(&w.config, &params, NULL, &bytes, &error));
        dsv4_matrix array = {w.m.data[i], (dsv4_dtype)0, 0};
        ASSERT_FAILS(DSV4_ERROR_ARGUMENT, words, dsv4_param_init(&w.config, (dsv4_param)i, 1, array, &error));
    }
    float numbers[4];
    const dsv4_mask_spec spec = {4, 0, 2, 2, 0};
    const dsv4_matrix mask = {numbers, (dsv4_dtype)0, 0};
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "dtype of mask is not given", dsv4_mask(&spec, mask, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "spec", dsv4_mask(NULL, mask, &error));
    workbench_free(&w);
    PASS();
}

/* Without segments all tokens, of x or of kv and gate, are one whole sequence, whose tail is refused or dropped. */
TEST the_easy_call_is_the_call_of_one_segment(const shape *of) {
    workbench w = workbench_new(of, 3, 7);
    sequence s = w.s;
    s.position = 0;
    results explicit_call = workbench_results(&w), easy = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &s, &explicit_call, NULL));
    dsv4_batch b = batch_new(&s, &easy, NULL, 0);
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    ASSERT_EQ(STAGE_COUNT, results_difference(&explicit_call, &easy));

    s.tokens -= w.config.ratio > 1;
    results tailed = workbench_results(&w);
    easy = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &s, &tailed, NULL));
    b = batch_new(&s, &easy, NULL, 0);
    if (w.config.ratio > 1)
        ASSERT_FAILS(DSV4_ERROR_LENGTH, "segment 0", dsv4_compress(w.e.compressor, &b, w.e.workspace, &error));
    ASSERT(results_untouched(&easy));
    b.drop_tail = 1;
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    ASSERT_EQ(STAGE_COUNT, results_difference(&tailed, &easy));

    easy = workbench_results(&w);
    b = batch_new(&s, &easy, NULL, 0);
    b.x.data = NULL;
    b.kv = tailed.stage[STAGE_KV];
    b.gate = w.config.no_gate ? NULL : tailed.stage[STAGE_GATE];
    b.drop_tail = 1;
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    ASSERT_EQ(STAGE_COUNT, results_difference(&tailed, &easy));
    workbench_free(&w);
    PASS();
}

/* Parameters whose rows lie apart are the same parameters; what lies between is not looked at. */
TEST strides_of_parameters_are_honoured(const shape *of) {
    enum { GAP = 5 };
    workbench w = workbench_new(of, 3, 8);
    model apart = w.m;
    for (int p = 0; p < DSV4_PARAM_COUNT; p++) {
        const dsv4_param_info *info = &w.m.info[p];
        dsv4_const_matrix *param = model_array(&apart.params, p);
        if (info->count == 0) continue;
        const size_t size = dsv4_dtype_size(param->dtype), stride = (size_t)info->columns + GAP;
        char *copy = workbench_memory(&w, (size_t)info->rows * stride * size);
        memset(copy, 0xFF, (size_t)info->rows * stride * size); /* NaN */
        for (int64_t row = 0; row < info->rows; row++)
            memcpy(copy + (size_t)row * stride * size, (const char *)w.m.data[p] + (size_t)(row * info->columns) * size,
                   (size_t)info->columns * size);
        param->data = copy;
        param->stride = info->columns + GAP;
    }
    engine e = keep_engine(&w, engine_new(&apart, NULL, NULL));
    results r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    workbench_free(&w);
    PASS();
}

TEST sizes_that_no_machine_has_are_overflows(void) {
    static const struct {
        int64_t hidden_dim, head_dim, ratio;
        int overlap;
        const char *words;
    } cases[] = {{INT32_MAX, INT32_MAX, 1, 0, "stride of wkv"},
                 {INT32_MAX, INT32_MAX, 1, 1, "stride of wkv"},
                 {1, INT32_MAX, INT32_MAX, 1, "stride of ape"},
                 {(1 << 30) - 1, (1 << 30) - 1, 1, 0, sizeof(size_t) == 8 ? "compressor" : "stride of wkv"}};
    float number = 1;
    const dsv4_const_matrix any = {&number, DSV4_F32, 0};
    dsv4_params params = {any, any, any, any};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        dsv4_config c = {0};
        c.hidden_dim = cases[i].hidden_dim;
        c.head_dim = cases[i].head_dim;
        c.ratio = cases[i].ratio;
        c.overlap = cases[i].overlap;
        size_t bytes = 12345;
        ledger l = {0};
        dsv4_allocator a = ledger_allocator(&l);
        dsv4_compressor *compressor = NULL;
        ASSERT_EQ(DSV4_OK, dsv4_config_check(&c, NULL));
        ASSERT_FAILS(DSV4_ERROR_OVERFLOW, cases[i].words, dsv4_compressor_size(&c, &params, NULL, &bytes, &error));
        ASSERT_FAILS(DSV4_ERROR_OVERFLOW, cases[i].words,
                     dsv4_compressor_create(&c, &params, NULL, &a, &compressor, &error));
        ASSERT_EQ_FMT(12345u, (unsigned)bytes, "%u");
        ASSERT_EQ_FMT(0, (int)l.calls, "%d");
    }
    PASS();
}

TEST destroying_nothing_is_fine(void) {
    dsv4_compressor_destroy(NULL);
    dsv4_workspace_destroy(NULL);
    dsv4_state_destroy(NULL);
    PASS();
}

TEST no_compressor_has_neither_configuration_nor_kernels(void) {
    ASSERT_EQ(NULL, dsv4_compressor_config(NULL));
    ASSERT_EQ(NULL, dsv4_compressor_isa(NULL));
    PASS();
}

/* However many threads it claims to keep busy. */
TEST a_parallel_for_that_cannot_run_is_none(void) {
    dsv4_parallel idle = {0};
    idle.threads = 8;
    workbench w = workbench_new(&shapes[1], 3, 17);
    engine e = workbench_engine(&w, NULL, &idle);
    results r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    workbench_free(&w);
    PASS();
}

/* Their layouts differ, although the configuration is one. */
TEST a_workspace_serves_no_other_kernel_set_and_no_training(void) {
    workbench w = workbench_new(&shapes[1], 2, 18);
    results r = workbench_results(&w);
    dsv4_batch b = workbench_batch(&w, &r);
    for (int training = 0; training < 2; training++) {
        const dsv4_options options = {training ? NULL : "scalar", training, 0};
        if (!training && !strcmp(best_isa(DSV4_SUMS_PAIRS), "scalar")) continue; /* there is no other set */
        engine other = keep_engine(&w, engine_with(&w.m, &options, NULL));
        ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "workspace", dsv4_compress(other.compressor, &b, w.e.workspace, &error));
    }
    ASSERT(results_untouched(&r));
    workbench_free(&w);
    PASS();
}

/* ... where their states are the same, too: rounded weights keep rows in any case. */
TEST a_workspace_serves_no_training_where_states_are_the_same(void) {
    dsv4_config c = shapes[1].config;
    c.rounding = DSV4_ROUND_WEIGHT;
    workbench w = workbench_for(&c, DSV4_F32, 0, 3);
    const dsv4_options options = {NULL, 1, 0};
    engine other = keep_engine(&w, engine_with(&w.m, &options, NULL));
    dsv4_batch b = {0};
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "workspace", dsv4_compress(other.compressor, &b, w.e.workspace, &error));
    workbench_free(&w);
    PASS();
}

/* Tokens few enough for x, whose projections are wider. */
TEST projections_that_no_machine_can_address_are_overflows(void) {
    workbench w = workbench_new(&shapes[13], 1, 19); /* H 1, D 1, overlap */
    results r = workbench_results(&w);
    dsv4_batch b = batch_new(&w.s, &r, NULL, 0);
    b.tokens = (int64_t)(SIZE_MAX / 32 + 1);
    ASSERT_FAILS(DSV4_ERROR_OVERFLOW, "kv", dsv4_compress(w.e.compressor, &b, w.e.workspace, &error));
    workbench_free(&w);
    PASS();
}

TEST kernel_sets_are_listed_best_first_and_scalar_last(void) {
    const int count = isa_count();
    ASSERT(dsv4_isa_name(0) != NULL);
    ASSERT_STR_EQ("scalar", dsv4_isa_name(count - 1));
    ASSERT_EQ(NULL, dsv4_isa_name(-1));
    ASSERT_EQ(NULL, dsv4_isa_name(count + 5));
    workbench w = workbench_new(&shapes[0], 1, 9);
    ASSERT_STR_EQ(best_isa(DSV4_SUMS_PAIRS), dsv4_compressor_isa(w.e.compressor));
    for (int i = 0; i < count; i++) {
        for (int k = 0; k < i; k++) ASSERT(strcmp(dsv4_isa_name(i), dsv4_isa_name(k)) != 0);
        engine e = workbench_engine(&w, dsv4_isa_name(i), NULL);
        ASSERT_STR_EQ(dsv4_isa_name(i), dsv4_compressor_isa(e.compressor));
    }
    workbench_free(&w);
    PASS();
}

/* ---- Compressing ------------------------------------------------------------------------------------------- */

/* A good call of two segments, to be made wrong: 4 tokens without a state, 4 for a state that has seen 2 (positions
 * from 1000). Ratio 4, H 48, D 24, overlap, fp32. Segments 0 and 1 are s[0] and s[1]. */
typedef struct bad_call_parts {
    dsv4_batch *b;
    dsv4_segment *s;
    engine *e;
    const engine *other;
} bad_call_parts;

#define BAD_CALLS(X)                                                                                                \
    X(no_compressor, c->e->compressor = NULL, DSV4_ERROR_NULL, "compressor")                                        \
    X(no_batch, c->b = NULL, DSV4_ERROR_NULL, "batch")                                                              \
    X(no_workspace, c->e->workspace = NULL, DSV4_ERROR_NULL, "workspace")                                           \
    X(workspace_of_another, c->e->workspace = c->other->workspace, DSV4_ERROR_ARGUMENT, "workspace")                \
    X(negative_tokens, c->b->tokens = -3, DSV4_ERROR_ARGUMENT, "tokens -3")                                         \
    X(negative_segment_count, c->b->segment_count = -2, DSV4_ERROR_ARGUMENT, "segment_count -2")                    \
    X(negative_entries, c->b->entries = -9, DSV4_ERROR_ARGUMENT, "entries -9")                                      \
    X(no_segments, c->b->segments = NULL, DSV4_ERROR_NULL, "segments")                                              \
    X(forgotten_segment_count, c->b->segment_count = 0, DSV4_ERROR_ARGUMENT, "segment_count 0 8")                   \
    X(no_dtype_of_x, c->b->x.dtype = (dsv4_dtype)0, DSV4_ERROR_ARGUMENT, "dtype of x is not given")                 \
    X(no_dtype_of_out, c->b->out.dtype = (dsv4_dtype)0, DSV4_ERROR_ARGUMENT, "dtype of out is not given")           \
    X(no_x, c->b->x.data = NULL, DSV4_ERROR_NULL, "x")                                                              \
    X(crooked_x, c->b->x.data = (const char *)c->b->x.data + 2, DSV4_ERROR_ALIGNMENT, "x 2 4")                      \
    X(crooked_bf16_x, (c->b->x.dtype = DSV4_BF16, c->b->x.data = (const char *)c->b->x.data + 1),                   \
      DSV4_ERROR_ALIGNMENT, "x 1 2")                                                                                \
    X(dtype_of_x, c->b->x.dtype = (dsv4_dtype)6, DSV4_ERROR_ARGUMENT, "x 6")                                        \
    X(short_x_stride, c->b->x.stride = 47, DSV4_ERROR_ARGUMENT, "stride of x 47 48")                                \
    X(negative_x_stride, c->b->x.stride = -48, DSV4_ERROR_ARGUMENT, "stride of x -48")                              \
    X(huge_x_stride, c->b->x.stride = INT64_MAX / 4, DSV4_ERROR_OVERFLOW, "stride of x")                            \
    X(kv_without_gate, c->b->kv = c->b->x.data, DSV4_ERROR_NULL, "gate")                                            \
    X(crooked_kv,                                                                                                   \
      (c->b->kv = (const float *)(const void *)((const char *)c->b->x.data + 2), c->b->gate = c->b->x.data),        \
      DSV4_ERROR_ALIGNMENT, "kv 2 4")                                                                               \
    X(crooked_gate,                                                                                                 \
      (c->b->kv = c->b->x.data, c->b->gate = (const float *)(const void *)((const char *)c->b->x.data + 1)),        \
      DSV4_ERROR_ALIGNMENT, "gate 1 4")                                                                             \
    X(no_out, c->b->out.data = NULL, DSV4_ERROR_NULL, "out")                                                        \
    X(crooked_out, c->b->out.data = (char *)c->b->out.data + 2, DSV4_ERROR_ALIGNMENT, "out 2 4")                    \
    X(crooked_bf16_out, (c->b->out.dtype = DSV4_BF16, c->b->out.data = (char *)c->b->out.data + 1),                 \
      DSV4_ERROR_ALIGNMENT, "out 1 2")                                                                              \
    X(dtype_of_out, c->b->out.dtype = (dsv4_dtype)-1, DSV4_ERROR_ARGUMENT, "out -1")                                \
    X(short_out_stride, c->b->out.stride = 23, DSV4_ERROR_ARGUMENT, "stride of out 23 24")                          \
    X(vast_weights, c->b->entries = (int64_t)(SIZE_MAX / 4 / 400), DSV4_ERROR_OVERFLOW, "stages.weights")           \
    X(huge_out_stride, c->b->out.stride = INT64_MAX, DSV4_ERROR_OVERFLOW, "stride of out")                          \
    X(crooked_kv_stage, c->b->stages.kv = crooked(c->b->stages.kv, 4), DSV4_ERROR_ALIGNMENT, "stages.kv 2")         \
    X(crooked_gate_stage, c->b->stages.gate = crooked(c->b->stages.gate, 4), DSV4_ERROR_ALIGNMENT, "stages.gate")   \
    X(crooked_weights, c->b->stages.weights = crooked(c->b->stages.weights, 4), DSV4_ERROR_ALIGNMENT,               \
      "stages.weights")                                                                                             \
    X(crooked_pooled, c->b->stages.pooled = crooked(c->b->stages.pooled, 4), DSV4_ERROR_ALIGNMENT, "stages.pooled") \
    X(crooked_latent, c->b->stages.latent = crooked(c->b->stages.latent, 4), DSV4_ERROR_ALIGNMENT, "stages.latent") \
    X(token_before_x, c->s[0].token = -1, DSV4_ERROR_BOUNDS, "segment 0 -1")                                        \
    X(token_past_x, c->s[0].token = 5, DSV4_ERROR_BOUNDS, "segment 0 5 4 8")                                        \
    X(token_far_past_x, c->s[1].token = INT64_MAX, DSV4_ERROR_BOUNDS, "segment 1 9223372036854775807")              \
    X(negative_count, c->s[1].count = -4, DSV4_ERROR_BOUNDS, "segment 1 -4")                                        \
    X(count_past_x, c->s[1].count = 5, DSV4_ERROR_BOUNDS, "segment 1 4 5 8")                                        \
    X(huge_count, c->s[1].count = INT64_MAX, DSV4_ERROR_BOUNDS, "segment 1 9223372036854775807")                    \
    X(negative_position, c->s[0].position = -1, DSV4_ERROR_BOUNDS, "segment 0 position -1")                         \
    X(huge_position, c->s[0].position = (int64_t)1 << 62, DSV4_ERROR_BOUNDS, "segment 0 4611686018427387904")       \
    X(position_that_ends_too_far, c->s[0].position = ((int64_t)1 << 62) - 4, DSV4_ERROR_BOUNDS, "segment 0")        \
    X(entry_before_out, c->s[0].entry = -1, DSV4_ERROR_BOUNDS, "segment 0 entries -1")                              \
    X(entry_past_out, c->s[1].entry = 2, DSV4_ERROR_BOUNDS, "segment 1 entries 2")                                  \
    X(entry_far_past_out, c->s[1].entry = INT64_MAX, DSV4_ERROR_BOUNDS, "segment 1 9223372036854775807")            \
    X(too_few_entries, c->b->entries = 1, DSV4_ERROR_BOUNDS, "segment 1 entries 1")                                 \
    X(too_few_tokens, c->b->tokens = 7, DSV4_ERROR_BOUNDS, "segment 1 tokens 7")                                    \
    X(length_not_divided, c->s[0].count = 3, DSV4_ERROR_LENGTH, "segment 0 3 4")                                    \
    X(position_too_low, c->s[1].position = 1001, DSV4_ERROR_STATE, "segment 1 1001 1002")                           \
    X(position_too_high, c->s[1].position = 1003, DSV4_ERROR_STATE, "segment 1 1003 1002")                          \
    X(state_twice, (c->s[0].state = c->s[1].state, c->s[0].position = 1002), DSV4_ERROR_STATE, "segment 1")
#define SPOIL_CALL(name, code, status, words) \
    static void call_##name(bad_call_parts *c) { (void)(code); }
BAD_CALLS(SPOIL_CALL)

static const struct bad_call {
    const char *name;
    void (*spoil)(bad_call_parts *c);
    dsv4_status status;
    const char *words;
} bad_calls[] = {
#define BAD_CALL_ROW(name, code, status, words) {#name, call_##name, status, words},
    BAD_CALLS(BAD_CALL_ROW)};
enum { BAD_CALL_COUNT = sizeof bad_calls / sizeof *bad_calls };

TEST a_bad_call_is_refused_and_changes_nothing(const struct bad_call *bad) {
    workbench w = workbench_new(&shapes[1], 2, 10);
    model strange = w.m; /* the same arrays under another configuration */
    strange.config.eps = 0.5f;
    engine other = keep_engine(&w, engine_new(&strange, NULL, NULL)), e = w.e;
    dsv4_state *state = workbench_state(&w, depth_for_weights(&w.config));
    results r = workbench_results(&w), before = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &before, state, 0, 2, NULL));
    const saved as_it_was = workbench_saved(&w, state);
    dsv4_segment segments[2] = {segment_new(0, 4, 0, 0, NULL), segment_new(4, 4, w.s.position + 2, 1, state)};
    dsv4_batch b = batch_new(&w.s, &r, segments, 2), good = b;
    bad_call_parts c = {&b, segments, &e, &other};
    bad->spoil(&c);
    ASSERT_FAILS(bad->status, bad->words, dsv4_compress(e.compressor, c.b, e.workspace, &error));
    ASSERT_EQ(bad->status, dsv4_compress(e.compressor, c.b, e.workspace, NULL));
    ASSERT(results_untouched(&r));
    ASSERT(is_still(state, &as_it_was));

    /* and the next call works */
    segments[0] = segment_new(0, 4, 0, 0, NULL);
    segments[1] = segment_new(4, 4, w.s.position + 2, 1, state);
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &good));
    ASSERT_EQ_FMT(6, (int)dsv4_state_tokens(state), "%d");

    workbench_free(&w);
    PASS();
}

/* Positions up to the very end of the range. */
TEST the_last_positions_are_accepted(void) {
    workbench w = workbench_new(&shapes[1], 2, 11);
    results r = workbench_results(&w);
    w.s.position = ((int64_t)1 << 62) - 9;
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, NULL));
    workbench_free(&w);
    PASS();
}

TEST no_tokens_need_no_arrays(void) {
    workbench w = workbench_new(&shapes[1], 1, 12);
    dsv4_batch nothing = {0};
    dsv4_segment empty = {0};
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &nothing));
    nothing.segments = &empty;
    nothing.segment_count = 1;
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &nothing));
    workbench_free(&w);
    PASS();
}

/* Ten thousand segments of nought to five tokens in one call. */
TEST thousands_of_short_segments_share_a_call(void) {
    enum { COUNT = 10000, MOST = 5 };
    workbench w = workbench_new(&shapes[10], 1, 13); /* ratio 2 */
    sequence s = keep_sequence(&w, shape_sequence(&shapes[10], COUNT * MOST, 14));
    results r = keep_results(&w, results_new(&w.config, w.out_dtype, s.tokens, COUNT * MOST / 2));
    results one = keep_results(&w, results_new(&w.config, w.out_dtype, s.tokens, 2));
    const dsv4_segment *segments = short_segments(&w, COUNT, MOST, 15);
    dsv4_batch b = batch_new(&s, &r, segments, COUNT);
    b.drop_tail = 1;
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    size_t row = r.bytes[STAGE_OUT] / (size_t)r.entries;
    for (int i = 0; i < COUNT; i += 97) {
        dsv4_segment alone = segments[i];
        alone.entry = 0;
        dsv4_batch single = batch_new(&s, &one, &alone, 1);
        single.drop_tail = 1;
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &single));
        ASSERT_MEM_EQ(one.stage[STAGE_OUT], (char *)r.stage[STAGE_OUT] + (size_t)segments[i].entry * row,
                      (size_t)(alone.count / 2) * row);
    }
    workbench_free(&w);
    PASS();
}

/* ---- States ------------------------------------------------------------------------------------------------ */

TEST state_functions_check_their_arguments(void) {
    workbench w = workbench_new(&shapes[1], 2, 16);
    dsv4_state *state = workbench_state(&w, depth_for_weights(&w.config));
    results r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, 3, NULL));
    size_t size = dsv4_state_save_size(state), written = 77;
    unsigned char *bytes = workbench_memory(&w, size);
    char sizes[64];
    memset(bytes, POISON, size);
    snprintf(sizes, sizeof sizes, "%u %u", (unsigned)size, (unsigned)size - 1);

    ASSERT_FAILS(DSV4_ERROR_NULL, "state", dsv4_state_reset(NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "state", dsv4_state_roll_back(NULL, 0, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "destination", dsv4_state_copy(NULL, state, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "source", dsv4_state_copy(state, NULL, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "state", dsv4_state_save(NULL, bytes, size, &written, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "bytes", dsv4_state_save(state, NULL, size, &written, &error));
    ASSERT_FAILS(DSV4_ERROR_BUFFER, sizes, dsv4_state_save(state, bytes, size - 1, &written, &error));
    ASSERT_FAILS(DSV4_ERROR_BUFFER, "0", dsv4_state_save(state, bytes, 0, &written, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "state", dsv4_state_restore(NULL, bytes, size, &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "bytes", dsv4_state_restore(state, NULL, size, &error));
    ASSERT(memory_untouched(bytes, size));
    ASSERT_EQ_FMT(77u, (unsigned)written, "%u");
    ASSERT_EQ_FMT(0u, (unsigned)dsv4_state_save_size(NULL), "%u");
    ASSERT_EQ_FMT(0, (int)dsv4_state_tokens(NULL), "%d");
    ASSERT_EQ_FMT(0, (int)dsv4_state_position(NULL), "%d");
    ASSERT_EQ_FMT(0, (int)dsv4_state_reach(NULL), "%d");
    ASSERT_EQ_FMT(3, (int)dsv4_state_tokens(state), "%d");
    ASSERT_EQ(DSV4_OK, dsv4_state_save(state, bytes, size, &written, NULL));
    ASSERT_EQ_FMT((unsigned)size, (unsigned)written, "%u");

    workbench_free(&w);
    PASS();
}

/* ---- Helpers ----------------------------------------------------------------------------------------------- */

TEST a_query_sees_the_entries_of_closed_windows(void) {
    for (int64_t ratio = 1; ratio <= 130; ratio += 43) {
        int64_t closed = 0;
        for (int64_t t = 0; t < 600; t++) {
            closed += t % ratio == ratio - 1;
            ASSERT_EQ_FMT((int)closed, (int)dsv4_visible_entries(t, ratio), "%d");
        }
    }
    ASSERT_EQ_FMT(0, (int)dsv4_visible_entries(-1, 4), "%d");
    ASSERT_EQ_FMT(0, (int)dsv4_visible_entries(INT64_MIN, 4), "%d");
    ASSERT_EQ_FMT(0, (int)dsv4_visible_entries(-1, 1), "%d");
    ASSERT_EQ_FMT(0, (int)dsv4_visible_entries(10, 0), "%d");
    ASSERT_EQ_FMT(0, (int)dsv4_visible_entries(10, -4), "%d");
    ASSERT(dsv4_visible_entries(INT64_MAX, 2) == (int64_t)1 << 62);
    ASSERT(dsv4_visible_entries(INT64_MAX - 1, 1) == INT64_MAX);
    ASSERT(dsv4_visible_entries(INT64_MAX, 1) == INT64_MAX);
    ASSERT(dsv4_visible_entries(INT64_MAX, INT64_MAX) == 1);
    PASS();
}

TEST entries_of_a_call_are_counted_without_overflow(void) {
    dsv4_config c = {.ratio = 4};
    for (int64_t count = 0; count < 50; count++)
        ASSERT_EQ_FMT((int)(count / 4), (int)dsv4_entry_count(&c, NULL, count), "%d");
    ASSERT(dsv4_entry_count(&c, NULL, INT64_MAX) == INT64_MAX / 4);
    ASSERT_EQ_FMT(0, (int)dsv4_entry_count(&c, NULL, -1), "%d");
    c.ratio = 0;
    ASSERT_EQ_FMT(0, (int)dsv4_entry_count(&c, NULL, 10), "%d");
    ASSERT_EQ_FMT(0, (int)dsv4_entry_count(NULL, NULL, 10), "%d");
    PASS();
}

#define mask_of(...) \
    &(dsv4_mask_spec) { __VA_ARGS__ } /* ratio, first, queries, entries, hidden */

TEST the_mask_hides_what_a_query_does_not_see(void) {
    static const int64_t ratios[] = {1, 3, 4, 128}, firsts[] = {0, 1, 3, 126, 1000};
    static const float hidden[] = {-INFINITY, -1e4f, -1.0f};
    enum { QUERIES = 9, ENTRIES = 11 };
    for (int i = 0; i < 4 * 5 * 3; i++) {
        int64_t ratio = ratios[i % 4], first = firsts[i / 4 % 5];
        float value = hidden[i / 20], wide[QUERIES * ENTRIES + 1];
        uint16_t narrow[QUERIES * ENTRIES + 1];
        memset(wide, POISON, sizeof wide);
        memset(narrow, POISON, sizeof narrow);
        ASSERT_EQ(DSV4_OK, dsv4_mask(mask_of(ratio, first, QUERIES, ENTRIES, value), matrix_of(wide, DSV4_F32), NULL));
        ASSERT_EQ(DSV4_OK,
                  dsv4_mask(mask_of(ratio, first, QUERIES, ENTRIES, value), matrix_of(narrow, DSV4_BF16), NULL));
        for (int64_t k = 0; k < QUERIES * ENTRIES; k++) {
            float expected = k % ENTRIES < (first + k / ENTRIES + 1) / ratio ? 0 : value;
            ASSERT_EQ_FMT((double)expected, (double)wide[k], "%g");
            ASSERT_EQ_FMT(oracle_bf16((double)expected), number(narrow, DSV4_BF16, k), "%g");
        }
        ASSERT(memory_untouched(wide + QUERIES * ENTRIES, 4) && memory_untouched(narrow + QUERIES * ENTRIES, 2));
    }
    PASS();
}

TEST the_mask_keeps_to_its_rows_and_hides_by_infinity(void) {
    float mask[2 * 7 + 3];
    const dsv4_matrix rows = {mask, DSV4_F32, 7};
    memset(mask, POISON, sizeof mask);
    ASSERT_EQ(DSV4_OK, dsv4_mask(mask_of(1, 0, 3, 3, 0), rows, NULL));
    for (int q = 0; q < 3; q++) {
        for (int e = 0; e < 3; e++) ASSERT_EQ_FMT(e <= q ? 0.0f : -INFINITY, mask[q * 7 + e], "%g");
        if (q < 2) ASSERT(memory_untouched(mask + q * 7 + 3, 4 * sizeof *mask));
    }
    PASS();
}

TEST the_mask_checks_its_arguments(void) {
    float mask[16];
    const float h = -1;
    memset(mask, POISON, sizeof mask);
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "ratio 0", dsv4_mask(mask_of(0, 0, 4, 4, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "ratio -1",
                 dsv4_mask(mask_of(-1, 0, 4, 4, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "first -1",
                 dsv4_mask(mask_of(4, -1, 4, 4, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "queries -4",
                 dsv4_mask(mask_of(4, 0, -4, 4, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "entries -4",
                 dsv4_mask(mask_of(4, 0, 4, -4, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "9223372036854775807",
                 dsv4_mask(mask_of(4, INT64_MAX, 4, 4, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "queries 9223372036854775807",
                 dsv4_mask(mask_of(4, 0, INT64_MAX, 0, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_OVERFLOW, "mask",
                 dsv4_mask(mask_of(4, 0, INT64_MAX / 8, INT64_MAX / 8, h), matrix_of(mask, DSV4_F32), &error));
    ASSERT_FAILS(DSV4_ERROR_ARGUMENT, "dtype 3",
                 dsv4_mask(mask_of(4, 0, 4, 4, h), matrix_of(mask, (dsv4_dtype)3), &error));
    ASSERT_FAILS(DSV4_ERROR_NULL, "mask", dsv4_mask(mask_of(4, 0, 4, 4, h), matrix_of(NULL, DSV4_F32), &error));
    ASSERT_EQ(DSV4_OK,
              dsv4_mask(mask_of(4, 0, 4, 0, h), matrix_of(mask, DSV4_F32), NULL)); /* nothing to write is fine */
    ASSERT_EQ(DSV4_OK, dsv4_mask(mask_of(4, 0, 0, 4, h), matrix_of(mask, DSV4_F32), NULL));
    ASSERT_FAILS(DSV4_ERROR_ALIGNMENT, "mask 4",
                 dsv4_mask(mask_of(4, 0, 3, 4, h), matrix_of(crooked(mask, 4), DSV4_F32), &error));
    ASSERT(memory_untouched(mask, sizeof mask));
    PASS();
}

/* ---- The suite --------------------------------------------------------------------------------------------- */

SUITE(api) {
    RUN_TEST(every_status_has_a_text_of_its_own);
    RUN_TEST(success_writes_no_error);
    RUN_TEST(dtypes_have_their_size);
    RUN_TEST(all_65536_bf16_numbers_are_widened_exactly_and_come_back);
    RUN_TEST(rounding_is_to_nearest_with_ties_to_even);
    RUN_TEST(numbers_beyond_the_largest_bf16_become_infinite);
    RUN_TEST(arrays_are_converted_as_single_numbers_are);
    RUN_TESTp(arrays_of_any_length_at_any_offset_are_converted_within_bounds, 0);
    RUN_TESTp(arrays_of_any_length_at_any_offset_are_converted_within_bounds, 20000);
    RUN_TEST(presets_are_the_published_models);
    RUN_TEST(no_preset_is_a_zeroed_configuration_that_is_refused);
    RUN_TEST(rounding_presets_are_made_of_their_points);
    RUN_TEST(every_rounding_has_a_name_that_reads_back);
    RUN_TEST(names_of_presets_and_points_can_be_joined);
    RUN_TEST(an_unknown_rounding_is_refused_and_the_known_ones_listed);
    RUN_TEST(a_name_that_does_not_fit_is_refused);
    FOR_EVERY(bad_configs, BAD_CONFIG_COUNT, a_bad_configuration_is_refused_everywhere, &bad_configs[i]);
    RUN_TEST(configurations_on_the_border_are_accepted);
    RUN_TEST(a_zero_field_takes_its_default);
    RUN_TEST(parameters_are_listed_by_configuration);
    RUN_TEST(parameter_functions_check_their_arguments);
    RUN_TEST(frequencies_are_correctly_rounded);
    RUN_TEST(frequencies_of_wild_settings_are_those_of_the_formula);
    RUN_TEST(frequencies_check_their_arguments);
    RUN_TEST(cos_and_sin_are_within_one_step);
    RUN_TEST(the_hardest_sines_are_correctly_rounded);
    RUN_TEST(cos_and_sin_of_special_angles);
    RUN_TEST(rope_is_right_at_any_position);
    RUN_TEST(the_heap_aligns_and_frees);
    RUN_TEST(an_arena_lays_blocks_one_after_another);
    FOR_EVERY_SHAPE(an_arena_of_exactly_the_sizes_named_holds_everything, of);
    FOR_EVERY(bad_params, BAD_PARAMS_COUNT, bad_parameters_are_refused, &bad_params[i]);
    RUN_TEST(parameters_the_configuration_lacks_must_not_be_given);
    FOR_EVERY_SHAPE(a_compressor_takes_little_more_than_its_weights, of);
    FOR_EVERY_SHAPE(every_object_ends_where_the_next_may_begin, of);
    RUN_TEST(creating_checks_its_arguments);
    RUN_TEST(an_allocator_that_fails_leaves_nothing_behind);
    RUN_TEST(a_dtype_that_is_not_given_is_refused);
    FOR_EVERY_SHAPE(the_easy_call_is_the_call_of_one_segment, of);
    FOR_EVERY_SHAPE(strides_of_parameters_are_honoured, of);
    RUN_TEST(sizes_that_no_machine_has_are_overflows);
    RUN_TEST(destroying_nothing_is_fine);
    RUN_TEST(no_compressor_has_neither_configuration_nor_kernels);
    RUN_TEST(a_parallel_for_that_cannot_run_is_none);
    RUN_TEST(a_workspace_serves_no_other_kernel_set_and_no_training);
    RUN_TEST(a_workspace_serves_no_training_where_states_are_the_same);
    RUN_TEST(projections_that_no_machine_can_address_are_overflows);
    RUN_TEST(kernel_sets_are_listed_best_first_and_scalar_last);
    FOR_EVERY(bad_calls, BAD_CALL_COUNT, a_bad_call_is_refused_and_changes_nothing, &bad_calls[i]);
    RUN_TEST(the_last_positions_are_accepted);
    RUN_TEST(no_tokens_need_no_arrays);
    RUN_TEST(thousands_of_short_segments_share_a_call);
    RUN_TEST(state_functions_check_their_arguments);
    RUN_TEST(a_query_sees_the_entries_of_closed_windows);
    RUN_TEST(entries_of_a_call_are_counted_without_overflow);
    RUN_TEST(the_mask_hides_what_a_query_does_not_see);
    RUN_TEST(the_mask_keeps_to_its_rows_and_hides_by_infinity);
    RUN_TEST(the_mask_checks_its_arguments);
}

TESTS_MAIN(api);
