/* Every check of dsv4_compress: a compressor of any configuration, any bits in the batch and in up to three
 * segments, with and without states of any tokens, position and depth. (Of stages.weights what depends on a segment
 * is in check_weights.c; entry_rows are in entry_rows.c.) */
// mutant: dsv4_compressor.h
// - if (segment->position < 0 || segment->position >= limit || segment->count >= limit - segment->position)
// + if (segment->position >= limit || segment->count >= limit - segment->position)
// eva: -eva-split-return-function fits:full,dsv4__begin_segments:full,dsv4__begin_call:full
#include "calls.h"

static void checks(const dsv4_compressor *c, int64_t count) {
    dsv4_workspace ws;
    dsv4_state states[2];
    dsv4_segment segments[SEGMENTS];
    dsv4_batch batch;
    dsv4__call call;
    dsv4_error error;
    memset(&ws, 0, sizeof ws);
    ws.compressor = c;
    any_state(c, &states[0]);
    any_state(c, &states[1]);
    any_batch(&batch, segments, states, count);
    if (dsv4__begin_call(c, &batch, &ws, &call, &error) != DSV4_OK) return;
    REACHED(begun);
    if (dsv4__check_outputs(c, &call.batch, &error) != DSV4_OK) return;
    REACHED(outputs);
    call.batch.stages.weights = NULL;
    if (dsv4__check_segments(c, &call.batch, &error) != DSV4_OK) return;
    REACHED(accepted);
}

int main(void) {
    dsv4_compressor c;
    if (!any_compressor(&c)) return 0;
    for (int64_t count = 0; count <= SEGMENTS; count++) checks(&c, count);
    REACHED(end);
    return 0;
}
