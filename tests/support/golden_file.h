/* golden_file.h - one file of tests/golden: a compressor's parameters, tokens and PyTorch's results, stage by stage. */

#ifndef TESTS_GOLDEN_FILE_H
#define TESTS_GOLDEN_FILE_H

#include "safetensors.h"
#include "workbench.h"

typedef struct golden {
    workbench w; /* its parameters and tokens, all rows of the batch, are the file's; no engine */
    st_file file;
    int64_t rows; /* of the batch */
    dsv4_segment segments[8];
} golden;

SUPPORT double golden_setting(const golden *g, const char *key) {
    const char *text = st_metadata(&g->file, key);
    return text ? strtod(text, NULL) : 0;
}

SUPPORT dsv4_const_matrix golden_array(const golden *g, const char *name) {
    const st_tensor *t = st_find(&g->file, name);
    dsv4_const_matrix a = {0};
    if (!t) return a;
    a.data = t->data;
    a.dtype = t->dtype == ST_BF16 ? DSV4_BF16 : DSV4_F32;
    return a;
}

SUPPORT uint32_t golden_rounding(const golden *g) {
    uint32_t rounding = 0;
    dsv4_error error = {0};
    if (dsv4_rounding_parse(st_metadata(&g->file, "preset"), &rounding, &error) == DSV4_OK) return rounding;
    fprintf(stderr, "tests: a golden file without a known preset: %s\n", error.text);
    exit(1);
}

/* The format of a file's rows: plain where it does not say. */
SUPPORT dsv4_rows golden_rows(const golden *g) {
    const char *text = st_metadata(&g->file, "rows");
    int rows = DSV4_ROWS_PLAIN;
    while (text && rows < DSV4_ROWS_COUNT && strcmp(text, dsv4_rows_name((dsv4_rows)rows)) != 0) rows++;
    return (dsv4_rows)rows;
}

SUPPORT golden golden_open(const char *name) {
    static const char *const param_names[] = {"wkv", "wgate", "ape", "norm"};
    golden g = {0};
    char path[256], message[256] = "";
    snprintf(path, sizeof path, "tests/golden/%s.safetensors", name);
    if (st_open(&g.file, path, message, sizeof message) != 0) {
        fprintf(stderr, "tests: %s: %s\n", path, message);
        exit(1);
    }
    const st_tensor *x = st_find(&g.file, "x"), *wkv = st_find(&g.file, "wkv");
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) *model_array(&g.w.m.params, i) = golden_array(&g, param_names[i]);
    dsv4_config *c = &g.w.config;
    c->hidden_dim = x->shape[2];
    c->overlap = golden_setting(&g, "coff") == 2;
    c->head_dim = wkv->shape[0] / (c->overlap ? 2 : 1);
    c->ratio = (int64_t)golden_setting(&g, "ratio");
    c->rope_dim = (int64_t)golden_setting(&g, "rope_dim");
    c->no_ape = !g.w.m.params.ape.data;
    c->no_gate = !g.w.m.params.wgate.data;
    c->rounding = golden_rounding(&g);
    c->rows = golden_rows(&g);
    c->eps = (float)golden_setting(&g, "eps");
    c->rope_theta = golden_setting(&g, "rope_theta");
    c->yarn_factor = golden_setting(&g, "yarn_factor");
    c->yarn_orig_ctx = golden_setting(&g, "yarn_orig_ctx");
    c->yarn_beta_fast = golden_setting(&g, "yarn_beta_fast");
    c->yarn_beta_slow = golden_setting(&g, "yarn_beta_slow");
    g.w.m.config = *c;
    const int64_t tokens = x->shape[1], entries = tokens / c->ratio, start = (int64_t)golden_setting(&g, "start");
    g.rows = x->shape[0];
    g.w.out_dtype = x->dtype == ST_BF16 ? DSV4_BF16 : DSV4_F32;
    g.w.entries = g.rows * entries;
    g.w.s = (sequence){(void *)(uintptr_t)x->data, g.w.out_dtype, g.rows * tokens, start};
    for (int64_t i = 0; i < g.rows; i++) g.segments[i] = segment_new(i * tokens, tokens, start, i * entries, NULL);
    return g;
}

SUPPORT void golden_close(golden *g) {
    workbench_free(&g->w);
    st_close(&g->file);
    memset(g, 0, sizeof *g);
}

/* All batch rows in one call, a segment each, every stage kept. */
SUPPORT dsv4_status golden_compress(golden *g, const char *isa, results *r, dsv4_error *error) {
    engine e = workbench_engine(&g->w, isa, NULL);
    *r = workbench_results(&g->w);
    dsv4_batch b = batch_new(&g->w.s, r, g->segments, g->rows);
    return dsv4_compress(e.compressor, &b, e.workspace, error);
}

/* Steps of bf16 between two bf16 numbers. */
SUPPORT int64_t bf16_steps(double a, double b) {
    int32_t ordered[2];
    const double values[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        int32_t bits = (int32_t)(bits_of_float((float)fabs(values[i])) >> 16);
        ordered[i] = values[i] < 0 ? -bits : bits;
    }
    return ordered[0] < ordered[1] ? ordered[1] - ordered[0] : ordered[0] - ordered[1];
}

/* How a measured stage stands to PyTorch's. */
typedef struct golden_distance {
    int64_t compared, equal, most_steps; /* most_steps: in bf16 steps */
    double furthest, largest;            /* largest absolute difference, largest absolute value */
    int narrow;                          /* the expected numbers are stored in bf16 */
} golden_distance;

SUPPORT golden_distance golden_compare(const golden *g, const results *r, int stage) {
    golden_distance d = {0};
    const st_tensor *t = st_find(&g->file, stage_name(stage));
    if (!t) return d;
    d.narrow = t->dtype == ST_BF16;
    for (int64_t i = 0; i < t->count; i++) {
        double expected = number(t->data, t->dtype == ST_BF16 ? DSV4_BF16 : DSV4_F32, i), got = result(r, stage, i);
        int64_t steps = bf16_steps(expected, got);
        d.compared++;
        d.equal += expected == got;
        if (steps > d.most_steps) d.most_steps = steps;
        d.furthest = isnan(got) ? INFINITY : fmax(d.furthest, fabs(expected - got));
        d.largest = fmax(d.largest, fabs(expected));
    }
    return d;
}

/* Whether a stage agrees. Preset none: everything within 2e-5. bf16 presets: what is stored in bf16 equal in 98.5 %,
 * the rest within 2 steps; what is stored in fp32 within 2e-5, or, where the preset rounds it, as if stored in bf16. */
SUPPORT int golden_agrees(const golden *g, int stage, const golden_distance *d) {
    static const uint32_t point[STAGE_COUNT] = {DSV4_ROUND_PROJECTION, DSV4_ROUND_PROJECTION, 0,
                                                DSV4_ROUND_POOLED,     DSV4_ROUND_SCALED,     DSV4_ROUND_ROW};
    if (d->narrow || (g->w.config.rounding & point[stage]))
        return d->most_steps <= 2 && (double)d->equal >= 0.985 * (double)d->compared;
    return d->furthest <= 2e-5 * fmax(1, d->largest);
}

/* Whether every stage agrees with PyTorch through this kernel set; if not, `message` says where. */
SUPPORT int golden_passes(const char *name, const char *isa, char *message, size_t size) {
    golden g = golden_open(name);
    results r = {0};
    dsv4_error error = {0};
    int passes = golden_compress(&g, isa, &r, &error) == DSV4_OK;
    if (!passes) snprintf(message, size, "%s, %s: %s", name, isa, error.text);
    for (int stage = 0; stage < STAGE_COUNT && passes; stage++) {
        if (stage == STAGE_WEIGHTS) continue;
        golden_distance d = golden_compare(&g, &r, stage);
        int expected = stage != STAGE_GATE || !g.w.config.no_gate;
        passes = expected ? d.compared == r.count[stage] && golden_agrees(&g, stage, &d) : d.compared == 0;
        if (!passes)
            snprintf(message, size, "%s, %s, %s: %d of %d equal, up to %d bf16 steps and %.3g apart", name, isa,
                     stage_name(stage), (int)d.equal, (int)d.compared, (int)d.most_steps, d.furthest);
    }
    golden_close(&g);
    return passes;
}

#endif /* TESTS_GOLDEN_FILE_H */
