/* entry_rows in the batch: any numbers in them, for calls of up to 8 tokens in three segments of any fields, with and
 * without states of any tokens; ratios from 1 to 9. They have one row for each entry, as the caller promises. */
// mutant: dsv4_compressor.h
// - for (int64_t i = *entries; i < *entries + count; i++)
// + for (int64_t i = *entries; i <= *entries + count; i++)
// eva: -eva-split-return-function fits:full -eva-slevel 3000
#include "calls.h"

enum { TOKENS = 8 };

/* Each of three segments closes at most one window for each token. */
static void checks(const dsv4_compressor *c, int64_t count) {
    int64_t rows[SEGMENTS * TOKENS];
    dsv4_state states[2];
    dsv4_segment segments[SEGMENTS];
    dsv4_batch batch;
    dsv4_error error;
    any_state(c, &states[0]);
    any_state(c, &states[1]);
    any_batch(&batch, segments, states, count);
    ANY(rows);
    batch.segments = segments;
    batch.stages.weights = NULL;
    batch.entry_rows = rows;
    batch.tokens = any_from(INT64_MIN, TOKENS);
    if (dsv4__check_segments(c, &batch, &error) == DSV4_OK)
        REACHED(accepted);
    else
        REACHED(refused);
}

int main(void) {
    dsv4_compressor c;
    if (!any_compressor(&c)) return 0;
    for (int ratio = 1; ratio < TOKENS + 2; ratio++) {
        c.config.ratio = ratio;
        for (int64_t count = 1; count <= SEGMENTS; count++) checks(&c, count);
    }
    REACHED(end);
    return 0;
}
