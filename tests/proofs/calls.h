/* calls.h - a compressor of any configuration that is accepted, and calls with any arguments: up to three segments, two
 * states. */
#include "config.h"

enum { SEGMENTS = 3 };
static const int64_t position_limit = (int64_t)1 << 62;

static int plan(const dsv4_config *config, dsv4_compressor *c) {
    dsv4_params params;
    dsv4_options options;
    dsv4_error error;
    ANY(params);
    ANY(options);
    options.isa = NULL;
    return dsv4__compressor_plan(config, &params, &options, c, &error) == DSV4_OK;
}

static int any_compressor(dsv4_compressor *c) {
    dsv4_config config;
    return any_config(&config) && plan(&config, c);
}

/* Of this compressor or another, with any depth, tokens, floor and position that a state can have. */
static void any_state(const dsv4_compressor *c, dsv4_state *state) {
    dsv4__state_plan(c, any_from(0, INT64_MAX / 4), Frama_C_interval(0, 1), state);
    if (Frama_C_interval(0, 1)) ANY(state->fingerprint);
    state->tokens = any_from(0, position_limit - 1);
    state->origin = any_from(0, position_limit - 1);
    state->floor = any_from(0, position_limit - 1);
}

static dsv4_state *one_of(dsv4_state states[2]) {
    const int which = Frama_C_interval(0, 2);
    return which == 2 ? NULL : &states[which];
}

/* Any bits in it, and the pointers to more of them there, or NULL; with so many segments, or, for 0, with any number of
 * them up to 0. (One number at a time: Eva does not see that segments beyond it have not been checked.) */
static void any_batch(dsv4_batch *batch, dsv4_segment segments[SEGMENTS], dsv4_state states[2], int64_t count) {
    Frama_C_make_unknown((char *)segments, SEGMENTS * sizeof *segments);
    for (int i = 0; i < SEGMENTS; i++) segments[i].state = one_of(states);
    Frama_C_make_unknown((char *)batch, sizeof *batch);
    batch->entry_rows = NULL;
    batch->segments = Frama_C_interval(0, 1) ? segments : NULL;
    batch->segment_count = count > 0 ? count : any_from(INT64_MIN, 0);
}
