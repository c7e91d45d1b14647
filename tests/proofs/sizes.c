/* What a configuration needs: parameters, bytes of rows, of the compressor (any parameter arrays, options, kernel set's
 * name), of workspaces for any number of threads and of states of any depth. */
// mutant: dsv4_compressor.h
// - depth < 0 || depth > INT64_MAX / 4
// + depth < 0
// eva: -eva-split-return-function fits:full
#include "config.h"

static void any_text(char *text, size_t size) {
    Frama_C_make_unknown(text, size);
    text[size - 1] = '\0';
}

static void of_compressor(const dsv4_compressor *c) {
    dsv4_error error;
    size_t bytes;
    if (dsv4_workspace_size(c, Frama_C_interval(INT32_MIN, INT32_MAX), &bytes, &error) == DSV4_OK) REACHED(workspace);
    if (dsv4_state_size(c, any_from(INT64_MIN, INT64_MAX), &bytes, &error) == DSV4_OK) REACHED(state);
}

int main(void) {
    dsv4_config config;
    dsv4_error error;
    dsv4_param_info info[DSV4_PARAM_COUNT];
    dsv4_params params;
    dsv4_options options;
    dsv4_compressor c;
    size_t bytes, scales;
    char isa[17];
    if (!any_config(&config)) return 0;
    ANY(params);
    ANY(options);
    any_text(isa, sizeof isa);
    options.isa = Frama_C_interval(0, 1) ? isa : NULL;
    if (dsv4_config_params(&config, info, &error) == DSV4_OK) REACHED(params);
    if (dsv4_row_sizes(&config, &bytes, &scales, &error) == DSV4_OK) REACHED(rows);
    if (dsv4_compressor_size(&config, &params, &options, &bytes, &error) == DSV4_OK) REACHED(compressor);
    if (dsv4__compressor_plan(&config, &params, &options, &c, &error) == DSV4_OK) of_compressor(&c);
    REACHED(end);
    return 0;
}
