/* tile_model.h - AMX's tile registers in plain C, after their description in Intel's manual: what the header's
 * product on tiles runs on where the CPU has none. It ends the program where the real ones would fault, or where a
 * tile is used that holds nothing. */

#ifndef TESTS_TILE_MODEL_H
#define TESTS_TILE_MODEL_H

#include <fenv.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define TILE_MODEL_THREAD __thread
#else
#define TILE_MODEL_THREAD _Thread_local
#endif

typedef struct tile_model {
    int rows, bytes; /* of a row; 0: not configured */
    int filled;
    unsigned char row[16][64];
} tile_model;

static TILE_MODEL_THREAD tile_model tile_models[8];
static TILE_MODEL_THREAD int tile_model_configured;

static void tile_model_need(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "tile_model.h: %s\n", what);
    abort();
}

/* LDTILECFG */
static void tile_model_configure(const unsigned char config[64]) {
    tile_model_need(!tile_model_configured, "tiles are configured that have not been released");
    tile_model_need(config[0] == 1 && config[1] == 0, "palette 1, from row 0 on");
    for (int i = 2; i < 16; i++) tile_model_need(config[i] == 0, "reserved bytes are 0");
    for (int t = 0; t < 16; t++) {
        const int bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8, rows = config[48 + t];
        tile_model_need(bytes <= 64 && rows <= 16 && (bytes == 0) == (rows == 0) && (t < 8 || rows == 0),
                        "8 tiles of at most 16 rows of 64 bytes");
        if (t >= 8) continue;
        memset(&tile_models[t], 0xFF, sizeof tile_models[t]); /* NaN */
        tile_models[t].rows = rows;
        tile_models[t].bytes = bytes;
        tile_models[t].filled = 0;
    }
    tile_model_configured = 1;
}

/* TILERELEASE */
static void tile_model_release(void) {
    tile_model_need(tile_model_configured, "tiles are released that have not been configured");
    memset(tile_models, 0, sizeof tile_models);
    tile_model_configured = 0;
}

static tile_model *tile_model_of(int t, int filled) {
    tile_model_need(tile_model_configured && tile_models[t].rows > 0, "a tile is used that has not been configured");
    tile_model_need(!filled || tile_models[t].filled, "a tile is used that holds nothing");
    tile_models[t].filled = 1;
    return &tile_models[t];
}

/* TILEZERO, TILELOADD, TILESTORED */
static void tile_model_zero(int t) {
    tile_model *tile = tile_model_of(t, 0);
    memset(tile->row, 0, sizeof tile->row);
}

static void tile_model_load(int t, const void *from, int64_t stride) {
    tile_model *tile = tile_model_of(t, 0);
    memset(tile->row, 0, sizeof tile->row);
    for (int r = 0; r < tile->rows; r++) memcpy(tile->row[r], (const char *)from + r * stride, (size_t)tile->bytes);
}

static void tile_model_store(int t, void *to, int64_t stride) {
    const tile_model *tile = tile_model_of(t, 1);
    for (int r = 0; r < tile->rows; r++) memcpy((char *)to + r * stride, tile->row[r], (size_t)tile->bytes);
}

static float tile_model_bf16(const unsigned char *row, int i) {
    uint16_t half;
    memcpy(&half, row + 2 * i, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* TDPBF16PS, which raises no flags */
static void tile_model_multiply(int c_index, int a_index, int b_index) {
    const tile_model *a = tile_model_of(a_index, 1), *b = tile_model_of(b_index, 1);
    tile_model *c = tile_model_of(c_index, 1);
    fenv_t flags;
    tile_model_need(a->rows == c->rows && b->bytes == c->bytes && a->bytes == 4 * b->rows, "tiles that do not fit");
    feholdexcept(&flags);
    for (int m = 0; m < c->rows; m++)
        for (int n = 0; n < c->bytes / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < b->rows; k++) {
                even += tile_model_bf16(a->row[m], 2 * k) * tile_model_bf16(b->row[k], 2 * n);
                odd += tile_model_bf16(a->row[m], 2 * k + 1) * tile_model_bf16(b->row[k], 2 * n + 1);
            }
            memcpy(&sum, c->row[m] + 4 * n, sizeof sum);
            sum += even + odd;
            memcpy(c->row[m] + 4 * n, &sum, sizeof sum);
        }
    fesetenv(&flags);
}

#endif /* TESTS_TILE_MODEL_H */

#define dsv4__t_configure(config)   tile_model_configure(config)
#define dsv4__t_release()           tile_model_release()
#define dsv4__t_zero(t)             tile_model_zero(t)
#define dsv4__t_load(t, p, stride)  tile_model_load(t, p, stride)
#define dsv4__t_store(t, p, stride) tile_model_store(t, p, stride)
#define dsv4__t_multiply(c, a, b)   tile_model_multiply(c, a, b)
