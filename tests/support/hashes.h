/* hashes.h - what the library computes, as hashes: every shape's stages, every preset's entries, conversions,
 * frequencies, saved states. Inputs come from integers alone, numbers are hashed as little-endian bytes, so that every
 * machine has to come to tests/hashes.txt. */

#ifndef TESTS_HASHES_H
#define TESTS_HASHES_H

#include "workbench.h"

enum { HASH_LINES = 700 };

typedef struct hash_line {
    char name[96];
    uint64_t hash;
} hash_line;

typedef struct hash_list {
    int count;
    hash_line lines[HASH_LINES];
} hash_list;

SUPPORT void hash_need(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "hashes: %s failed\n", what);
    exit(1);
}

/* ---- Numbers as bytes --------------------------------------------------------------------------------------- */

SUPPORT uint64_t hash_number(uint64_t hash, uint32_t number, int size) {
    unsigned char bytes[4];
    for (int i = 0; i < size; i++) bytes[i] = (unsigned char)(number >> (8 * i));
    return hash_bytes(hash, bytes, (size_t)size);
}

SUPPORT uint64_t hash_array(const void *data, dsv4_dtype dtype, int64_t count) {
    uint64_t hash = hash_start;
    for (int64_t i = 0; i < count; i++) {
        if (dtype == DSV4_BF16)
            hash = hash_number(hash, ((const uint16_t *)data)[i], 2);
        else
            hash = hash_number(hash, bits_of_float(((const float *)data)[i]), 4);
    }
    return hash;
}

SUPPORT void hash_add(hash_list *list, const char *name, const char *part, uint64_t hash) {
    hash_line *line = &list->lines[list->count];
    hash_need(list->count < HASH_LINES, name);
    snprintf(line->name, sizeof line->name, "%s.%s", name, part);
    line->hash = hash;
    list->count++;
}

/* ---- Compressors ------------------------------------------------------------------------------------------- */

/* A configuration with parameters from dsv4_param_init, but for norm: multiples of 1/64 around 1. */
SUPPORT model hash_model(const shape *of, uint32_t rounding, dsv4_rows rows) {
    model m = {.config = of->config};
    m.config.rounding = rounding;
    m.config.rows = rows;
    hash_need(dsv4_config_params(&m.config, m.info, NULL) == DSV4_OK, of->name);
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (m.info[i].count == 0) continue;
        m.data[i] = reserve((size_t)m.info[i].count * dsv4_dtype_size(of->param[i]));
        const dsv4_matrix to = matrix_of(m.data[i], of->param[i]);
        hash_need(dsv4_param_init(&m.config, (dsv4_param)i, 1234, to, NULL) == DSV4_OK, "init");
        *model_array(&m.params, i) = (dsv4_const_matrix){m.data[i], of->param[i], 0};
    }
    dice d = {5};
    for (int64_t i = 0; i < m.info[DSV4_NORM].count; i++)
        set_number(m.data[DSV4_NORM], of->param[DSV4_NORM], i, (float)(dice_below(&d, 128) - 32) / 64.0f);
    return m;
}

SUPPORT workbench hash_bench(const shape *of, const char *isa, uint32_t rounding, dsv4_rows rows, int64_t tokens,
                             uint64_t seed) {
    workbench w = workbench_with(hash_model(of, rounding, rows), shape_sequence(of, tokens, seed), of->out);
    w.e = workbench_engine(&w, isa, NULL);
    return w;
}

/* One call's stages; and the entries of the same tokens in cuts of three, which have to be the same. */
SUPPORT void hash_shape(const shape *of, int64_t windows, uint32_t rounding, const char *isa, int stages,
                        hash_list *list) {
    static const int64_t cut[] = {3, 1, 230};
    workbench w = hash_bench(of, isa, rounding, DSV4_ROWS_PLAIN, windows * of->config.ratio, 99);
    results whole = workbench_results(&w), parts = workbench_results(&w);
    w.s.position = 1000003;
    hash_need(compress_whole(&w.e, &w.s, &whole, NULL) == DSV4_OK, of->name);
    hash_need(compress_cut(&w.e, &w.s, &parts, cut, 3, NULL) == DSV4_OK, of->name);
    char name[64], point[DSV4_ROUNDING_TEXT_SIZE];
    hash_need(dsv4_rounding_name(rounding, point, sizeof point, NULL) == DSV4_OK, "rounding_name");
    snprintf(name, sizeof name, stages ? "%s" : "%s.%.24s", of->name, point);
    for (int i = stages ? STAGE_KV : STAGE_OUT; i < STAGE_COUNT; i++) {
        dsv4_dtype dtype = i >= STAGE_LATENT ? of->out : DSV4_F32;
        if (whole.count[i] > 0) hash_add(list, name, stage_name(i), hash_array(whole.stage[i], dtype, whole.count[i]));
    }
    hash_add(list, name, "out.cut", hash_array(parts.stage[STAGE_OUT], of->out, parts.count[STAGE_OUT]));
    workbench_free(&w);
}

/* A stream's saved bytes, somewhere within a window. */
SUPPORT void hash_saved(const shape *of, const char *isa, hash_list *list) {
    workbench w = hash_bench(of, isa, of->config.rounding, DSV4_ROWS_PLAIN, 4 * of->config.ratio + 1, 98);
    results r = workbench_results(&w);
    dsv4_state *state = workbench_state(&w, 3);
    hash_need(compress_part(&w.e, &w.s, &r, state, 0, w.s.tokens, NULL) == DSV4_OK, of->name);
    const saved bytes = workbench_saved(&w, state);
    hash_add(list, of->name, "saved", hash_bytes(hash_start, bytes.bytes, bytes.size));
    workbench_free(&w);
}

/* ---- Rows as caches hold them ------------------------------------------------------------------------------ */

/* What is read back in fp32, and, packed, the bytes of rows and scales. */
SUPPORT void hash_rows(dsv4_rows rows, uint32_t rounding, const char *isa, hash_list *list) {
    enum { ENTRIES = 30 };
    static const shape of = {
        .name = "rows",
        .config = {.hidden_dim = 48, .head_dim = 256, .ratio = 4, .rope_dim = 64, .overlap = 1, .yarn_factor = 16},
        .param = {DSV4_BF16, DSV4_BF16, DSV4_F32, DSV4_BF16},
        .x = DSV4_BF16,
        .out = DSV4_F32};
    workbench w = hash_bench(&of, isa, rounding, rows, 4 * ENTRIES, 97);
    size_t row_bytes = 0, scale_bytes = 0;
    hash_need(dsv4_row_sizes(&w.config, &row_bytes, &scale_bytes, NULL) == DSV4_OK, "row_sizes");
    float *read = workbench_memory(&w, ENTRIES * 256 * sizeof *read);
    unsigned char *packed = workbench_memory(&w, ENTRIES * row_bytes);
    unsigned char *scales = workbench_memory(&w, ENTRIES * scale_bytes);
    dsv4_batch b = batch_reading(&w.s, ENTRIES, NULL, 0);
    b.out = matrix_of(read, DSV4_F32);
    hash_need(workbench_compress(&w, &b) == DSV4_OK, dsv4_rows_name(rows));
    b.out = matrix_of(packed, DSV4_PACKED);
    b.scales = matrix_of(scales, DSV4_PACKED);
    hash_need(workbench_compress(&w, &b) == DSV4_OK, dsv4_rows_name(rows));
    char name[64];
    snprintf(name, sizeof name, "rows.%s%s", dsv4_rows_name(rows), rounding ? ".deepseek" : "");
    hash_add(list, name, "out", hash_array(read, DSV4_F32, ENTRIES * 256));
    hash_add(list, name, "packed", hash_bytes(hash_start, packed, ENTRIES * row_bytes));
    hash_add(list, name, "scales", hash_bytes(hash_start, scales, ENTRIES * scale_bytes));
    workbench_free(&w);
}

/* ---- Numbers ----------------------------------------------------------------------------------------------- */

SUPPORT void hash_conversions(hash_list *list) {
    uint64_t hash = hash_start;
    dice d = {7};
    for (int i = 0; i < 100000; i++) {
        uint32_t bits = (uint32_t)dice_next(&d);
        if ((bits & 0x7FFFFFFFu) <= 0x7F800000u) hash = hash_number(hash, dsv4_bf16_from_f32(float_of_bits(bits)), 2);
    }
    hash_add(list, "numbers", "bf16_from_f32", hash);

    hash = hash_start;
    for (int i = 0; i < 100000; i++) {
        float cosine, sine, angle = float_of_bits((uint32_t)(dice_next(&d) % 0x4F000000u)); /* up to 2^31 */
        dsv4_cos_sin(angle, &cosine, &sine);
        hash = hash_number(hash_number(hash, bits_of_float(cosine), 4), bits_of_float(sine), 4);
    }
    hash_add(list, "numbers", "cos_sin", hash);

    hash = hash_start;
    for (int preset = 0; preset < DSV4_PRESET_COUNT; preset++) {
        float inv_freq[32];
        dsv4_config c = dsv4_preset_config((dsv4_preset)preset);
        hash_need(dsv4_rope_frequencies(&c, inv_freq, 32, NULL) == DSV4_OK, "rope_frequencies");
        for (int i = 0; i < 32; i++) hash = hash_number(hash, bits_of_float(inv_freq[i]), 4);
    }
    hash_add(list, "numbers", "rope_frequencies", hash);
}

/* ---- All --------------------------------------------------------------------------------------------------- */

SUPPORT void hash_all(const char *isa, hash_list *list) {
    list->count = 0;
    hash_conversions(list);
    for (int i = 0; i < SHAPE_COUNT; i++) {
        hash_shape(&shapes[i], 6, shapes[i].config.rounding, isa, 1, list);
        hash_saved(&shapes[i], isa, list);
        for (int p = 0; p < ROUNDING_COUNT; p++) hash_shape(&shapes[i], 6, roundings[p].bits, isa, 0, list);
    }
    for (int i = 0; i < LONG_SHAPE_COUNT; i++)
        hash_shape(&long_shapes[i], shape_windows(&long_shapes[i], 0) / 3 + 1, long_shapes[i].config.rounding, isa, 1,
                   list);
    for (int rows = DSV4_ROWS_FP8; rows < DSV4_ROWS_COUNT; rows++) {
        hash_rows((dsv4_rows)rows, DSV4_ROUNDING_NONE, isa, list);
        hash_rows((dsv4_rows)rows, DSV4_ROUNDING_DEEPSEEK, isa, list);
    }
}

/* Index of the first line that differs, -1 where none does. */
SUPPORT int hash_difference(const hash_list *a, const hash_list *b) {
    int count = a->count < b->count ? a->count : b->count;
    for (int i = 0; i < count; i++)
        if (a->lines[i].hash != b->lines[i].hash || strcmp(a->lines[i].name, b->lines[i].name) != 0) return i;
    return a->count == b->count ? -1 : count;
}

SUPPORT void hash_print(FILE *to, const hash_list *list) {
    for (int i = 0; i < list->count; i++)
        fprintf(to, "%08lx%08lx %s\n", (unsigned long)(list->lines[i].hash >> 32),
                (unsigned long)(list->lines[i].hash & 0xFFFFFFFFu), list->lines[i].name);
}

/* Reads tests/hashes.txt; 0 where there is none. */
SUPPORT int hash_read(hash_list *list) {
    FILE *file = fopen("tests/hashes.txt", "rb");
    char text[128];
    list->count = 0;
    if (!file) return 0;
    while (fgets(text, sizeof text, file) && list->count < HASH_LINES) {
        hash_line *line = &list->lines[list->count];
        unsigned long high = 0, low = 0;
        if (sscanf(text, "%8lx%8lx %95s", &high, &low, line->name) != 3) break;
        line->hash = (uint64_t)high << 32 | low;
        list->count++;
    }
    fclose(file);
    return list->count > 0;
}

#endif /* TESTS_HASHES_H */
