/* dsv4_state_restore. Any bytes of every length up to 96 through its checks, for states of any head_dim, any depth
 * and ratio 1 to 3, with and without overlap, that fold or keep rows. Then what takes the bytes over: saved states
 * of 0 to 5 tokens with any floor, at any position, other bytes any, into states of head_dim 1 and depth 0 to 2. */
// mutant: dsv4_compressor.h
// - for (int64_t t = dsv4__state_first(state, s, saved_floor); t < state->tokens; t++, from += state->row * 4)
// + for (int64_t t = dsv4__state_first(state, s, saved_floor); t <= state->tokens; t++, from += state->row * 4)
// eva: -eva-precision 2 -eva-slevel 60 -eva-auto-loop-unroll 300 -eva-slevel-function dsv4__hash:0
#include "proof.h"

enum { TOKENS = 5, MOST_DEPTH = 2, ROOM = 1024, LONGEST = 96 };

static unsigned char bytes[ROOM];

/* A compressor, as far as states ask. */
static dsv4_compressor compressor_of(int kind, int64_t ratio, int64_t head_dim) {
    dsv4_compressor c;
    memset(&c, 0, sizeof c);
    c.config.head_dim = head_dim;
    c.config.ratio = ratio;
    c.config.pad_gate = -INFINITY;
    c.series = 1 + kind % 2;
    c.matrices = 2;
    return c;
}

/* The bytes stand at the end of memory that has no more. */
static void checks(int kind, int64_t ratio, size_t size) {
    const dsv4_compressor c = compressor_of(kind, ratio, any_from(1, INT32_MAX));
    dsv4_state state;
    dsv4_error error;
    dsv4__state_plan(&c, any_from(0, INT64_MAX / 4), kind / 2, &state);
    ANY(bytes);
    if (dsv4__check_saved(&state, bytes + ROOM - size, size, &error) == DSV4_OK)
        REACHED(accepted);
    else
        REACHED(refused);
}

/* Of the length that they say; with any other, they have been refused above. */
static void restores(dsv4_state *state, int64_t tokens, int64_t floor) {
    const size_t size = DSV4__SAVE_HEADER + DSV4__SAVE_CHECK + dsv4__fold_bytes(state, dsv4__live_folds(state, floor)) +
                        (size_t)(dsv4__live_rows(state, tokens, floor) * state->row) * sizeof(float);
    unsigned char *from = bytes + ROOM - size;
    dsv4_error error;
    ANY(bytes);
    dsv4__write64(from + 32, (uint64_t)tokens);
    dsv4__write64(from + 40, (uint64_t)floor);
    if (dsv4_state_restore(state, from, size, &error) == DSV4_OK) REACHED(restored);
}

static void of_depth(int kind, int64_t ratio, int64_t depth) {
    static unsigned char block[ROOM];
    const dsv4_compressor c = compressor_of(kind, ratio, 1);
    dsv4_state *state = dsv4__state_place(&c, depth, kind / 2, block);
    //@ loop unroll TOKENS + 1;
    for (int64_t tokens = 0; tokens <= TOKENS; tokens++)
        //@ loop unroll TOKENS + 1;
        for (int64_t floor = 0; floor <= tokens; floor++) restores(state, tokens, floor);
}

int main(void) {
    //@ loop unroll 4;
    for (int kind = 0; kind < 4; kind++)
        //@ loop unroll 3;
        for (int64_t ratio = 1; ratio <= 3; ratio++) {
            //@ loop unroll LONGEST + 1;
            for (size_t size = 0; size <= LONGEST; size++) checks(kind, ratio, size);
            //@ loop unroll MOST_DEPTH + 1;
            for (int64_t depth = 0; depth <= MOST_DEPTH; depth++) of_depth(kind, ratio, depth);
        }
    REACHED(end);
    return 0;
}
