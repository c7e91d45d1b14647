/* dsv4_entry_count and dsv4_visible_entries with any arguments; dsv4_mask of up to 3 queries and 3 entries in bf16 and
 * fp32 at any position, ratio, stride that fits, and value; with any numbers at all where they are refused. */
// mutant: dsv4_compressor.h
// - ratio < 1 || first < 0 || queries < 0 || entries < 0 || first > INT64_MAX / 2 || queries > INT64_MAX / 2
// + ratio < 1 || first < 0 || queries < 0 || entries < 0
// eva: -eva-precision 3
#include "proof.h"

enum { QUERIES = 3, ENTRIES = 3, NUMBERS = 9 };

/* A ratio of 1 apart: with others, a quotient has room for one more. */
static void of_counts(int64_t least, int64_t most) {
    const int64_t count = any_from(INT64_MIN, INT64_MAX);
    dsv4_config config;
    dsv4_state state;
    ANY(config);
    ANY(state);
    config.ratio = any_from(least, most);
    state.tokens = any_from(0, INT64_MAX); /* never less */
    const int64_t entries = dsv4_entry_count(&config, Frama_C_interval(0, 1) ? &state : NULL, count);
    //@ check entries >= 0;
    const int64_t visible = dsv4_visible_entries(count, config.ratio);
    //@ check visible >= 0;
    REACHED(counts);
}

/* The stride that the last row reaches the array's end with, and fewer. */
static void of_masks(dsv4_dtype dtype) {
    float numbers[NUMBERS];
    dsv4_mask_spec spec;
    dsv4_error error;
    for (int64_t queries = 0; queries <= QUERIES; queries++)
        for (int64_t entries = 0; entries <= ENTRIES; entries++)
            for (int64_t stride = 0; stride <= (queries > 1 ? (NUMBERS - entries) / (queries - 1) : NUMBERS);
                 stride++) {
                const dsv4_matrix mask = {numbers, dtype, stride};
                ANY(spec);
                spec.queries = queries;
                spec.entries = entries;
                if (dsv4_mask(&spec, mask, &error) == DSV4_OK) REACHED(mask);
            }
}

/* Sizes without bounds, of which those that are not refused stop at the first number, as there is no memory. */
static void of_refused(void) {
    dsv4_mask_spec spec;
    dsv4_error error;
    dsv4_matrix mask;
    ANY(spec);
    ANY(mask);
    spec.entries = any_from(INT64_MIN, 0);
    if (dsv4_mask(&spec, mask, &error) == DSV4_OK) REACHED(nothing_to_write);
    mask.data = NULL;
    spec.entries = any_from(INT64_MIN, INT64_MAX);
    if (dsv4_mask(&spec, mask, &error) != DSV4_OK) REACHED(refused);
}

int main(void) {
    of_counts(INT64_MIN, 0);
    of_counts(1, 1);
    of_counts(2, INT64_MAX);
    if (dsv4_entry_count(NULL, NULL, 1) == 0) REACHED(no_configuration);
    of_masks(DSV4_F32);
    of_masks(DSV4_BF16);
    of_refused();
    REACHED(end);
    return 0;
}
