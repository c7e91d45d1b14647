/* dsv4_config_check with any bits in the configuration. What it accepts has each field in its range (`fits`). */
// mutant: dsv4_compressor.h
// - if ((unsigned)full.rows >= (unsigned)DSV4_ROWS_COUNT)
// + if ((unsigned)full.rows > (unsigned)DSV4_ROWS_COUNT)
// eva: -eva-split-return-function fits:full
#include "config.h"

static void refuses(const dsv4_config *config) {
    dsv4_error error;
    const dsv4_status status = dsv4_config_check(config, &error);
    //@ check status != DSV4_OK;
    REACHED(refused);
}

/* Octave by octave: Eva does not see in a range of numbers that one of many bits is set. */
static void refuses_unknown_roundings(void) {
    for (int bit = 11; bit < 32; bit++) {
        dsv4_config config;
        ANY(config);
        config.rounding = (uint32_t)any_from((int64_t)1 << bit, ((int64_t)2 << bit) - 1);
        refuses(&config);
    }
    //@ check dsv4__all_points == (1 << 11) - 1;
    REACHED(roundings);
}

static void refuses_without(int field) {
    dsv4_config config;
    ANY(config);
    if (!fits(&config, field)) refuses(&config);
}

int main(void) {
    dsv4_config config;
    dsv4_error error;
    ANY(config);
    if (dsv4_config_check(&config, &error) == DSV4_OK) REACHED(accepted);
    for (int field = 0; field < CONFIG_FIELDS; field++)
        if (field != ROUNDING_FIELD) refuses_without(field);
    refuses_unknown_roundings();
    if (dsv4_config_check(NULL, NULL) == DSV4_ERROR_NULL) REACHED(end);
    return 0;
}
