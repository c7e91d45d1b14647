/* PyTorch's results in the reference pipelines' own types, stage by stage, through every kernel set of this CPU. */

#define _POSIX_C_SOURCE 200809L

#include "runner.h"
#include "golden_file.h"

/* clang-format off */
static const char *const files[] = {
    "csa_deepseek", "csa_deepseek_far", "csa_loud", "csa_maxtext", "csa_maxtext_f32_params", "csa_none",
    "csa_none_odd_width", "csa_none_one_window", "csa_rotated", "csa_transformers", "csa_transformers_5_8",
    "grad_csa", "grad_hca", "hca_deepseek", "hca_maxtext", "hca_none", "hca_none_ratio16", "hca_rotated",
    "hca_transformers", "hca_transformers_5_8", "indexer_deepseek", "v41_ratio1", "v41_ratio2",
};
/* clang-format on */

TEST agrees_with_pytorch(const char *file, const char *isa) {
    static char message[256];
    ASSERTm(message, golden_passes(file, isa, message, sizeof message));
    PASS();
}

/* The weights of every channel of every window sum to one, whatever was rounded: no row is counted twice or left
 * out. */
TEST weights_sum_to_one(const char *file) {
    golden g = golden_open(file);
    results r = {0};
    ASSERT_EQ(DSV4_OK, golden_compress(&g, NULL, &r, NULL));
    int64_t rows = g.w.config.ratio * (g.w.config.overlap ? 2 : 1), dim = g.w.config.head_dim;
    double tolerance = g.w.config.rounding & DSV4_ROUND_WEIGHT ? 4e-3 : 1e-6;
    for (int64_t e = 0; e < r.entries; e++) {
        for (int64_t d = 0; d < dim; d++) {
            double sum = 0;
            for (int64_t j = 0; j < rows; j++) sum += result(&r, STAGE_WEIGHTS, (e * rows + j) * dim + d);
            ASSERT_IN_RANGE(1, sum, tolerance);
        }
    }
    golden_close(&g);
    PASS();
}

/* Rows that window 0 lacks weigh exactly nothing. */
TEST the_pad_of_the_first_window_weighs_nothing(const char *file) {
    golden g = golden_open(file);
    results r = {0};
    ASSERT_EQ(DSV4_OK, golden_compress(&g, NULL, &r, NULL));
    for (int64_t row = 0; row < g.rows; row++) {
        int64_t first = row * (g.w.entries / g.rows) * 2 * g.w.config.ratio * g.w.config.head_dim;
        for (int64_t i = 0; i < g.w.config.ratio * g.w.config.head_dim; i++)
            ASSERT_EQ_FMT(0.0, result(&r, STAGE_WEIGHTS, first + i), "%g");
    }
    golden_close(&g);
    PASS();
}

SUITE(golden_cases) {
    for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
        for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
            RUN_NAMED(note("%s_%s", files[f], isa), agrees_with_pytorch, files[f], isa);
        }
        RUN_NAMED(files[f], weights_sum_to_one, files[f]);
        if (strncmp(files[f], "csa", 3) != 0) continue;
        RUN_NAMED(files[f], the_pad_of_the_first_window_weighs_nothing, files[f]);
    }
}

TESTS_MAIN(golden_cases);
