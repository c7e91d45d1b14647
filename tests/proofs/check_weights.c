/* What stages.weights asks of a state: one of any configuration, tokens, floor and depth, before any number of
 * tokens. */
// mutant: dsv4_compressor.h
// - const int64_t ratio = state->ratio, lag = state->series - 1, first = state->tokens / ratio;
// + const int64_t ratio = state->ratio, lag = state->series - 1, first = state->tokens;
// eva: -eva-split-return-function fits:full
#include "calls.h"

/* Ratios octave by octave: there ratio * (tokens / ratio) stays near tokens, whichever they are. */
int main(void) {
    dsv4_compressor c;
    if (!any_compressor(&c)) return 0;
    for (int octave = 0; octave < 31; octave++) {
        dsv4_state state;
        dsv4_error error;
        c.config.ratio = any_from((int64_t)1 << octave, ((int64_t)2 << octave) - 1);
        any_state(&c, &state);
        if (dsv4__check_weights(&state, any_from(0, position_limit - 1), 0, &error) == DSV4_OK)
            REACHED(accepted);
        else
            REACHED(refused);
    }
    REACHED(end);
    return 0;
}
