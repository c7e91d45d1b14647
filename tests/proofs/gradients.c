/* Every check of dsv4_backward: a compressor of any configuration, any bits in the batch, the gradients' matrices
 * and up to three segments, states of any tokens, position and depth among them and among next and previous. */
// mutant: dsv4_compressor.h
// - if (previous != NULL && previous->marked)
// + if (previous->marked)
// eva: -eva-split-return-function fits:full,dsv4__begin_segments:full,dsv4__begin_call:full
// eva: -eva-precision 4 -eva-slevel 1000
#include "calls.h"

static void checks(const dsv4_compressor *c, int64_t count) {
    dsv4_workspace ws;
    dsv4_state states[2], others[2];
    dsv4_segment segments[SEGMENTS];
    dsv4_segment_gradient carried[SEGMENTS];
    dsv4_batch batch;
    dsv4__back back;
    dsv4_error error;
    memset(&ws, 0, sizeof ws);
    memset(&back, 0, sizeof back);
    ws.compressor = c;
    for (int i = 0; i < 2; i++) {
        any_state(c, &states[i]);
        any_state(c, &others[i]);
    }
    any_batch(&batch, segments, states, count);
    for (int i = 0; i < SEGMENTS; i++) {
        carried[i].next = Frama_C_interval(0, 1) ? one_of(others) : one_of(states);
        carried[i].previous = Frama_C_interval(0, 1) ? one_of(others) : one_of(states);
    }
    if (dsv4__begin_call(c, &batch, &ws, &back.call, &error) != DSV4_OK) return;
    REACHED(begun);
    ANY(back.g);
    back.g.segments = Frama_C_interval(0, 1) ? carried : NULL;
    back.call.batch.stages.weights = NULL;
    if (dsv4__check_gradients(&back, &error) == DSV4_OK)
        REACHED(accepted);
    else
        REACHED(refused);
}

/* What decides whether a configuration is accepted is left at its defaults: it is checked again, and Eva forgets. */
static void any_dimensions(dsv4_config *config, int no_gate) {
    memset(config, 0, sizeof *config);
    config->hidden_dim = any_from(1, INT32_MAX);
    config->head_dim = any_from(1, INT32_MAX);
    config->ratio = no_gate ? 1 : any_from(1, INT32_MAX);
    config->overlap = no_gate ? 0 : Frama_C_interval(0, 1);
    config->no_ape = Frama_C_interval(0, 1);
    config->no_gate = no_gate;
}

int main(void) {
    for (int no_gate = 0; no_gate < 2; no_gate++) {
        dsv4_config config;
        dsv4_compressor c;
        any_dimensions(&config, no_gate);
        if (!plan(&config, &c)) continue;
        for (int64_t count = 0; count <= SEGMENTS; count++) checks(&c, count);
    }
    REACHED(end);
    return 0;
}
