/* sample.c - weights and hidden states to try `compress` on, in one safetensors file: sample FILE [TOKENS]
 *
 * The shape of DeepSeek-V4-Flash's CSA compressor, with seeded weights. The hidden states are noise but for some tokens
 * that carry a call: a step along the gate's own rows, so that a band of the channels wants to keep that token. In the
 * gate map these stand out of the noise as the meaningful tokens of a text would. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "demo.h"
#include "safetensors.h"

enum { SEED = 4, BANDS = 4, CALLS = BANDS + 1, TOKENS = 1024 };

/* calls[b] [H]: the sum of wgate's rows of band b in both series; the last call is all of them. Sums alone, in order:
 * the same bits on every machine. */
static void sum_calls(const dsv4_config *config, const dsv4_bf16 *wgate, float *calls) {
    const int64_t hidden_dim = config->hidden_dim, head_dim = config->head_dim;
    for (int64_t row = 0; row < 2 * head_dim; row++) {
        float *band = calls + row % head_dim * BANDS / head_dim * hidden_dim;
        float *all = calls + BANDS * hidden_dim;
        for (int64_t k = 0; k < hidden_dim; k++) {
            const float weight = dsv4_bf16_to_f32(wgate[row * hidden_dim + k]);
            band[k] += weight;
            all[k] += weight;
        }
    }
}

/* Which call token t carries; CALLS for none. About a quarter of the tokens carry one. */
static int64_t call_of(int64_t t) {
    const uint64_t draw = demo_bits((uint64_t)t ^ (uint64_t)SEED << 32) >> 32;
    return draw % 4 ? CALLS : (int64_t)(draw / 4 % CALLS);
}

static void fill_hidden_states(const dsv4_config *config, const float *calls, int64_t tokens, dsv4_bf16 *x) {
    const int64_t hidden_dim = config->hidden_dim;
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t call = call_of(t);
        demo_hidden_state(x + t * hidden_dim, hidden_dim, SEED, t);
        for (int64_t k = 0; k < hidden_dim && call < CALLS; k++) {
            const float noise = dsv4_bf16_to_f32(x[t * hidden_dim + k]);
            x[t * hidden_dim + k] = dsv4_bf16_from_f32(noise + 4 * calls[call * hidden_dim + k]);
        }
    }
}

static int write_sample(const char *path, const dsv4_config *config, const dsv4_params *params, const dsv4_bf16 *x,
                        int64_t tokens) {
    const int64_t width = 2 * config->head_dim, hidden_dim = config->hidden_dim;
    const int64_t matrix[2] = {width, hidden_dim}, ape[2] = {config->ratio, width}, states[3] = {1, tokens, hidden_dim};
    const st_tensor tensors[] = {
        st_make("wkv.weight", ST_BF16, params->wkv.data, 2, matrix),
        st_make("wgate.weight", ST_BF16, params->wgate.data, 2, matrix),
        st_make("ape", ST_F32, params->ape.data, 2, ape),
        st_make("norm.weight", ST_BF16, params->norm.data, 1, &config->head_dim),
        st_make("x", ST_BF16, x, 3, states),
    };
    const char *const metadata[][2] = {{"kind", "csa"}, {"preset", "deepseek"}, {"rope_dim", "64"}};
    char message[1024];
    if (st_write(path, tensors, 5, metadata, 3, message, sizeof message)) {
        fprintf(stderr, "sample: %s\n", message);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    const dsv4_config config = dsv4_preset_config(DSV4_V4_FLASH_CSA);
    const int64_t tokens = argc > 2 ? strtoll(argv[2], NULL, 10) : TOKENS;
    if (argc < 2 || tokens < 1 || tokens > 1 << 24) {
        fprintf(stderr, "usage: sample FILE [TOKENS]\n");
        return 2;
    }
    dsv4_params params = {0};
    float *calls = (float *)calloc((size_t)(CALLS * config.hidden_dim), sizeof *calls);
    dsv4_bf16 *x = (dsv4_bf16 *)malloc((size_t)(tokens * config.hidden_dim) * sizeof *x);
    int status = 1;
    if (demo_params(&config, SEED, &params) || !calls || !x) {
        fprintf(stderr, "sample: out of memory\n");
    } else {
        sum_calls(&config, (const dsv4_bf16 *)params.wgate.data, calls);
        fill_hidden_states(&config, calls, tokens, x);
        status = write_sample(argv[1], &config, &params, x, tokens);
    }
    free(x);
    free(calls);
    demo_free_params(&params);
    return status;
}
