/* Rounding to bf16, and the exponential of softmax, number by number. TESTS_SLOW in the environment: each of the 2^32
 * fp32 numbers, and every seventh that the exponential is asked for. */

#include "implementation.h"
#include "runner.h"
#include "workbench.h"

#include <float.h>

enum { HALVES = 65536 };

/* What the fp32 number of these two halves rounds to: up beyond the middle of the step, and on it from odd. */
static unsigned nearest(unsigned upper, unsigned lower) {
    return upper + (lower > 0x8000 || (lower == 0x8000 && (upper & 1) == 1));
}

static int is_nan_of(unsigned upper, unsigned lower) {
    return (upper & 0x7F80) == 0x7F80 && ((upper & 0x7F) | lower) != 0;
}

/* A NaN stays a quiet one of its sign. */
static int rounds_right(unsigned upper, unsigned lower, unsigned got) {
    if (is_nan_of(upper, lower)) return (got & 0x7FC0) == 0x7FC0 && (got & 0x8000) == (upper & 0x8000);
    return got == nearest(upper, lower);
}

/* The first lower half that is not rounded right beside this upper one, HALVES where all are. */
static unsigned first_wrong(unsigned upper, float *wide, dsv4_bf16 *narrow) {
    for (unsigned lower = 0; lower < HALVES; lower++) wide[lower] = float_of_bits(upper << 16 | lower);
    dsv4_bf16_from_f32_array(narrow, wide, HALVES);
    for (unsigned lower = 0; lower < HALVES; lower++)
        if (!rounds_right(upper, lower, narrow[lower]) || narrow[lower] != dsv4_bf16_from_f32(wide[lower]))
            return lower;
    return HALVES;
}

TEST fp32_numbers_round_to_the_nearest_bf16(void) {
    static float wide[HALVES];
    static dsv4_bf16 narrow[HALVES];
    const unsigned step = getenv("TESTS_SLOW") ? 1 : 249;
    for (unsigned upper = 0; upper < HALVES; upper += step) {
        const unsigned wrong = first_wrong(upper, wide, narrow);
        ASSERTm(note("%#x: %#x", upper << 16 | wrong, (unsigned)narrow[wrong % HALVES]), wrong == HALVES);
    }
    PASS();
}

/* How a kernel set is made to round any number: with x, wkv and so the pooled row all 1, RMSNorm's mean is exactly
 * 1, and an entry is norm itself, as rounded on its way out. */
static dsv4_config mirror_config(uint32_t rounding) {
    return (dsv4_config){.hidden_dim = 1,
                         .head_dim = HALVES,
                         .ratio = 1,
                         .no_ape = 1,
                         .no_gate = 1,
                         .rounding = rounding,
                         .eps = 1e-20f};
}

/* out [HALVES] = norm [HALVES], the numbers of each upper half with this lower one, rounded by the kernel set. */
static void mirror(const char *isa, unsigned lower, uint32_t rounding, dsv4_dtype out_dtype, void *out) {
    static float norm[HALVES];
    static dsv4_bf16 ones[HALVES];
    for (unsigned upper = 0; upper < HALVES; upper++) {
        norm[upper] = float_of_bits(upper << 16 | lower);
        ones[upper] = 0x3F80;
    }
    workbench w = {.m = {.params = {.wkv = {ones, DSV4_BF16, 0}, .norm = {norm, DSV4_F32, 0}}}};
    w.m.config = mirror_config(rounding);
    w.e = workbench_engine(&w, isa, NULL);
    const dsv4_batch b = {.x = {ones, DSV4_BF16, 0}, .tokens = 1, .out = {out, out_dtype, 0}, .entries = 1};
    if (workbench_compress(&w, &b) != DSV4_OK) exit(1);
    workbench_free(&w);
}

/* On its way to a bf16 array (narrowed), and at a rounding point (kept as fp32). */
TEST every_kernel_set_rounds_to_the_nearest_bf16(const char *isa) {
    static const unsigned lowers[] = {0x8000, 0x7FFF, 0x8001, 0, 1, 0xFFFF};
    static dsv4_bf16 narrow[HALVES];
    static float kept[HALVES];
    const unsigned count = getenv("TESTS_SLOW") ? 256 : 6;
    for (unsigned i = 0; i < count; i++) {
        const unsigned lower = i < 6 ? lowers[i] : i * 40503 % HALVES;
        mirror(isa, lower, 0, DSV4_BF16, narrow);
        mirror(isa, lower, DSV4_ROUND_SCALED, DSV4_F32, kept);
        for (unsigned upper = 0; upper < HALVES; upper++) {
            if ((upper & 0x7F80) == 0) continue; /* subnormal products are nobody's promise */
            const unsigned bits = bits_of_float(kept[upper]);
            ASSERTm(note("%#x, narrowed: %#x", upper << 16 | lower, (unsigned)narrow[upper]),
                    rounds_right(upper, lower, narrow[upper]));
            ASSERTm(note("%#x, kept: %#x", upper << 16 | lower, bits), rounds_right(upper, lower, bits >> 16));
            ASSERTm(note("%#x, kept: %#x", upper << 16 | lower, bits), (bits & 0xFFFF) == 0 || isnan(kept[upper]));
        }
    }
    PASS();
}

/* How far off e^x is, in units of the last place of the true one. */
static double exp_error(float x) {
    int exponent;
    const double right = exp((double)x);
    (void)frexp(right, &exponent);
    return fabs(((double)softmax_exp(x) - right) / ldexp(1, exponent - 24));
}

TEST exponentials_are_within_2_ulp(void) {
    const uint32_t step = getenv("TESTS_SLOW") ? 7 : 1009, first = 0x80000000u, last = 0xc2aeac4fu; /* -0, -87.33654 */
    double worst = 0;
    for (uint32_t bits = first; bits <= last; bits += step) worst = fmax(worst, exp_error(float_of_bits(bits)));
    ASSERTm(note("%g", worst), worst <= 2);
    ASSERT_EQ(1.0f, softmax_exp(-0.0f));
    ASSERT(softmax_exp(float_of_bits(last)) >= FLT_MIN);
    ASSERT_EQ(0.0f, softmax_exp(float_of_bits(last + 1)));
    ASSERT_EQ(0.0f, softmax_exp(-FLT_MAX));
    ASSERT_EQ(0.0f, softmax_exp(-INFINITY));
    ASSERT(isnan(softmax_exp(NAN)));
    PASS();
}

SUITE(exhaustive) {
    RUN_TEST(exponentials_are_within_2_ulp);
    RUN_TEST(fp32_numbers_round_to_the_nearest_bf16);
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        RUN_NAMED(isa, every_kernel_set_rounds_to_the_nearest_bf16, isa);
    }
}

TESTS_MAIN(exhaustive);
