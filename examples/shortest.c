/* shortest.c - 16 tokens in, 4 entries out. */
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include <stdio.h>

enum { HIDDEN = 24, HEAD = 8, RATIO = 4, TOKENS = 16 };

int main(void) {
    dsv4_config config = {.hidden_dim = HIDDEN, .head_dim = HEAD, .ratio = RATIO, .rope_dim = 4, .overlap = 1};
    static float wkv[2 * HEAD * HIDDEN], wgate[2 * HEAD * HIDDEN], ape[RATIO * 2 * HEAD], norm[HEAD];
    dsv4_param_init(&config, DSV4_WKV, 1, DSV4_F32, wkv, NULL); /* a model's own weights go here */
    dsv4_param_init(&config, DSV4_WGATE, 1, DSV4_F32, wgate, NULL);
    dsv4_param_init(&config, DSV4_APE, 1, DSV4_F32, ape, NULL);
    dsv4_param_init(&config, DSV4_NORM, 1, DSV4_F32, norm, NULL);
    dsv4_params params = {
        .wkv = {wkv, DSV4_F32}, .wgate = {wgate, DSV4_F32}, .ape = {ape, DSV4_F32}, .norm = {norm, DSV4_F32}};

    dsv4_allocator heap = dsv4_heap();
    dsv4_error error = {DSV4_OK, ""};
    dsv4_compressor *compressor = NULL;
    dsv4_workspace *workspace = NULL;
    dsv4_status status = dsv4_compressor_create(&config, &params, NULL, &heap, &compressor, &error);
    if (status == DSV4_OK) status = dsv4_workspace_create(compressor, NULL, &heap, &workspace, &error);

    static float x[TOKENS][HIDDEN], out[TOKENS / RATIO][HEAD];
    for (int i = 0; i < TOKENS * HIDDEN; i++) x[i / HIDDEN][i % HIDDEN] = (float)(i * i % 17) - 8;
    dsv4_segment whole = {.count = TOKENS};
    dsv4_batch batch = {
        .x = x, .tokens = TOKENS, .out = out, .entries = TOKENS / RATIO, .segments = &whole, .segment_count = 1};
    if (status == DSV4_OK) status = dsv4_compress(compressor, &batch, workspace, &error);
    if (status != DSV4_OK) printf("%s\n", error.text);
    for (int i = 0; i < TOKENS; i++) printf("%8.4f%s", out[i / 4][i % 4], i % 4 == 3 ? " ...\n" : "");
    dsv4_workspace_destroy(workspace);
    dsv4_compressor_destroy(compressor);
    return status != DSV4_OK;
}
