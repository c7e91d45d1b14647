/* Presets and names: any index, any text of up to 16 characters, any size of a buffer that is there. */
// mutant: dsv4_compressor.h
// - if ((unsigned)preset >= (unsigned)DSV4_PRESET_COUNT) return config;
// + if ((unsigned)preset > (unsigned)DSV4_PRESET_COUNT) return config;
// eva: -eva-precision 3 -eva-slevel 3000
#include "proof.h"

static void of_indices(void) {
    const int index = Frama_C_interval(INT32_MIN, INT32_MAX);
    if (dsv4_status_text((dsv4_status)index) != NULL) REACHED(status_text);
    if (dsv4_preset_name((dsv4_preset)index) != NULL) REACHED(preset_name);
    if (dsv4_preset_config((dsv4_preset)index).ratio == 128) REACHED(preset_config);
    if (dsv4_preset_rows((dsv4_preset)index) == DSV4_ROWS_FP4) REACHED(preset_rows);
    if (dsv4_rows_name((dsv4_rows)index) != NULL) REACHED(rows_name);
    if (dsv4_isa_name(index) != NULL) REACHED(isa_name);
    if (dsv4_dtype_size((dsv4_dtype)index) != 0) REACHED(dtype_size);
}

static void of_texts(void) {
    char text[17];
    dsv4_error error;
    uint32_t rounding;
    const dsv4__kernels *set;
    ANY(text);
    text[sizeof text - 1] = '\0';
    if (dsv4_rounding_parse(text, &rounding, &error) == DSV4_OK) REACHED(parsed);
    if (dsv4__set_by_name(text, DSV4_SUMS_PAIRS, &set, &error) == DSV4_OK) REACHED(set);
}

/* With a buffer of every size up to the longest name's and one more. */
static void of_roundings(void) {
    char text[DSV4_ROUNDING_TEXT_SIZE + 1];
    dsv4_error error;
    const uint32_t rounding = (uint32_t)any_from(0, UINT32_MAX);
    const size_t size = (size_t)any_from(0, sizeof text);
    if (dsv4_rounding_name(rounding, text, size, &error) == DSV4_OK) REACHED(rounding_name);
}

int main(void) {
    of_indices();
    of_texts();
    of_roundings();
    REACHED(end);
    return 0;
}
