/* shortest.c - 16 tokens in, 4 entries out. */
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include <stdio.h>

enum { HIDDEN = 24, HEAD = 8, RATIO = 4, TOKENS = 16 };

int main(void) {
    const dsv4_config config = {.hidden_dim = HIDDEN, .head_dim = HEAD, .ratio = RATIO, .rope_dim = 4, .overlap = 1};
    static float wkv[2 * HEAD * HIDDEN], wgate[2 * HEAD * HIDDEN], ape[RATIO * 2 * HEAD], norm[HEAD];
    const dsv4_matrix arrays[] = {{wkv, DSV4_F32, 0}, {wgate, DSV4_F32, 0}, {ape, DSV4_F32, 0}, {norm, DSV4_F32, 0}};
    const dsv4_params params = {{wkv, DSV4_F32, 0}, {wgate, DSV4_F32, 0}, {ape, DSV4_F32, 0}, {norm, DSV4_F32, 0}};
    static float x[TOKENS][HIDDEN], out[TOKENS / RATIO][HEAD];
    const dsv4_batch batch = {
        .x = {x, DSV4_F32, 0}, .tokens = TOKENS, .out = {out, DSV4_F32, 0}, .entries = TOKENS / RATIO};
    const dsv4_allocator heap = dsv4_heap();
    dsv4_compressor *compressor = NULL;
    dsv4_workspace *workspace = NULL;
    dsv4_error error;
    int failed = 0;

    for (int i = 0; i < DSV4_PARAM_COUNT; i++) /* a model's own weights go here */
        failed |= dsv4_param_init(&config, (dsv4_param)i, 1, arrays[i], &error) != DSV4_OK;
    for (int i = 0; i < TOKENS * HIDDEN; i++) x[i / HIDDEN][i % HIDDEN] = (float)(i * i % 17) - 8;
    failed = failed || dsv4_compressor_create(&config, &params, NULL, &heap, &compressor, &error) ||
             dsv4_workspace_create(compressor, NULL, &heap, &workspace, &error) ||
             dsv4_compress(compressor, &batch, workspace, &error);
    if (failed) printf("%s\n", error.text);
    for (int i = 0; i < TOKENS && !failed; i++) printf("%8.4f%s", out[i / 4][i % 4], i % 4 == 3 ? " ...\n" : "");
    dsv4_workspace_destroy(workspace);
    dsv4_compressor_destroy(compressor);
    return failed;
}
