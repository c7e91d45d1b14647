/* shapes.h - the table of small compressors that the suites of streams and of bits go through: every rounding preset,
 * every mix of types, odd sizes, overlap with any ratio. */

#ifndef TESTS_SHAPES_H
#define TESTS_SHAPES_H

#include "support.h"

typedef struct shape {
    const char *name;
    int hidden_dim, head_dim, ratio, rope_dim, overlap, no_ape, no_gate;
    uint32_t rounding;
    dsv4_dtype param[DSV4_PARAM_COUNT], x, out;
    dsv4_sums sums;
} shape;

#define F DSV4_F32
#define B DSV4_BF16
#define P DSV4_SUMS_PAIRS
#define T DSV4_SUMS_TILES
/* clang-format off */
static const shape shapes[] = {
    /* name                H   D   m  R  overlap, no_ape, no_gate  rounding                  wkv gate ape norm  x
     * out sums */
    {"csa_bf16",           64, 40, 4, 16, 1, 0, 0, DSV4_ROUNDING_DEEPSEEK,     {B, B, F, B}, B, B, P},
    {"csa_f32",            48, 24, 4, 8,  1, 0, 0, DSV4_ROUNDING_NONE,         {F, F, F, F}, F, F, P},
    {"csa_odd",            37, 23, 4, 6,  1, 0, 0, DSV4_ROUNDING_MAXTEXT,      {B, F, B, F}, F, B, P},
    {"csa_two_blocks",     515, 17, 4, 2, 1, 0, 0, DSV4_ROUNDING_NONE,         {B, B, B, B}, B, F, P},
    {"overlap_ratio_1",    33, 12, 1, 4,  1, 0, 0, DSV4_ROUNDING_TRANSFORMERS, {F, B, F, B}, B, B, P},
    {"overlap_ratio_3",    16, 35, 3, 34, 1, 1, 0, DSV4_ROUNDING_NONE,         {B, B, F, F}, F, F, P},
    {"overlap_ratio_9",    20, 5,  9, 4,  1, 0, 0, DSV4_ROUNDING_DEEPSEEK,     {F, F, B, B}, B, F, P},
    {"hca_bf16",           64, 33, 16, 32, 0, 0, 0, DSV4_ROUNDING_TRANSFORMERS, {B, B, F, B}, B, B, P},
    {"hca_f32",            300, 16, 8, 0, 0, 0, 0, DSV4_ROUNDING_NONE,         {F, F, F, F}, F, F, P},
    {"hca_mixed",          29, 31, 5, 10, 0, 0, 0, DSV4_ROUND_WEIGHT,          {F, B, B, F}, F, B, P},
    {"v41_ratio_2",        40, 32, 2, 16, 0, 1, 0, DSV4_ROUNDING_DEEPSEEK,     {B, B, B, B}, B, B, P},
    {"v41_ratio_1",        40, 32, 1, 16, 0, 1, 1, DSV4_ROUNDING_DEEPSEEK,     {B, B, B, B}, B, B, P},
    {"ratio_1_gated",      19, 7,  1, 2,  0, 0, 0, DSV4_ROUNDING_MAXTEXT,      {F, F, F, F}, F, F, P},
    {"one_number",         1,  1,  2, 0,  1, 0, 0, DSV4_ROUNDING_NONE,         {F, F, F, F}, F, F, P},
    {"csa_tiles",          64, 40, 4, 16, 1, 0, 0, DSV4_ROUNDING_DEEPSEEK,     {B, B, F, B}, B, B, T},
    {"hca_tiles",          77, 33, 7, 32, 0, 0, 0, DSV4_ROUNDING_NONE,         {B, B, F, F}, B, F, T},
    {"tiles_two_blocks",   517, 17, 3, 2, 1, 0, 0, DSV4_ROUNDING_MAXTEXT,      {F, B, B, B}, B, B, T},
    {"tiles_ratio_1",      33, 49, 1, 16, 0, 1, 1, DSV4_ROUNDING_DEEPSEEK,     {B, B, B, B}, B, B, T},
    {"tiles_mixed",        45, 20, 5, 4,  1, 0, 0, DSV4_ROUNDING_TRANSFORMERS, {B, F, F, F}, B, F, T},
    {"tiles_f32",          48, 24, 4, 8,  1, 0, 0, DSV4_ROUNDING_NONE,         {F, F, F, F}, F, F, T},
};

/* For sequences of many hundred tokens: more than what is worked on at a time, windows longer than that among them. */
static const shape long_shapes[] = {
    {"csa_long",           258, 130, 4, 64, 1, 0, 0, DSV4_ROUNDING_DEEPSEEK,   {B, B, F, B}, B, B, P},
    {"csa_long_f32",       130, 65, 4, 16, 1, 0, 0, DSV4_ROUNDING_NONE,        {F, F, F, F}, F, F, P},
    {"hca_ratio_128",      64, 70, 128, 8, 0, 0, 0, DSV4_ROUNDING_MAXTEXT,     {B, B, F, B}, B, B, P},
    {"overlap_ratio_300",  31, 34, 300, 8, 1, 0, 0, DSV4_ROUNDING_NONE,        {F, B, F, B}, F, F, P},
    {"ratio_1_long",       40, 33, 1, 16, 0, 1, 1, DSV4_ROUNDING_DEEPSEEK,     {B, B, B, B}, B, B, P},
    {"csa_tiles_long",     290, 130, 4, 64, 1, 0, 0, DSV4_ROUNDING_DEEPSEEK,   {B, B, F, B}, B, B, T},
    {"hca_tiles_long",     63, 35, 128, 8, 0, 0, 0, DSV4_ROUNDING_NONE,        {B, B, F, B}, B, F, T},
    {"ratio_1_tiles_long", 2100, 9, 1, 4, 0, 1, 1, DSV4_ROUNDING_DEEPSEEK,     {B, B, B, B}, B, B, T},
};

/* The oddest sizes. */
static const shape odd_shapes[] = {
    {"ratio_4096",         1, 1, 4096, 0, 0, 0, 0, DSV4_ROUNDING_NONE,         {F, F, F, F}, F, F, P},
    {"overlap_4096",       2, 3, 4096, 2, 1, 0, 0, DSV4_ROUNDING_MAXTEXT,      {B, F, F, F}, F, B, P},
    {"head_dim_1",         5, 1, 4, 0,    1, 0, 0, DSV4_ROUNDING_NONE,         {F, F, F, F}, B, F, P},
    {"hidden_dim_1",       1, 40, 1, 2,   1, 0, 0, DSV4_ROUNDING_NONE,         {B, B, B, B}, B, B, P},
    {"wide",               3, 1030, 2, 1030, 1, 0, 0, DSV4_ROUNDING_DEEPSEEK,  {B, B, F, B}, B, B, T},
    {"tall",               9001, 2, 3, 2, 0, 0, 0, DSV4_ROUNDING_NONE,         {F, F, F, F}, F, F, P},
};
/* clang-format on */
#undef F
#undef B
#undef P
#undef T
enum { ODD_SHAPE_COUNT = sizeof odd_shapes / sizeof *odd_shapes };
enum { SHAPE_COUNT = sizeof shapes / sizeof *shapes, LONG_SHAPE_COUNT = sizeof long_shapes / sizeof *long_shapes };

/* No multiple of any vector: `tail` more than one of 16 channels' and terms. */
SUPPORT shape tail_shape(int tail, int ratio, int rope_dim, dsv4_dtype x, dsv4_dtype out) {
    const dsv4_sums sums = tail % 2 ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
    shape of = {"", 16 + tail, 17 + tail, ratio, rope_dim, tail % 2, 0, 0, 0, {DSV4_F32}, x, out, sums};
    return of;
}

/* Windows of a long shape's sequence. */
SUPPORT int64_t long_windows(const shape *of) { return 900 / of->ratio; }

SUPPORT dsv4_config shape_config(const shape *s) {
    dsv4_config c = {0};
    c.hidden_dim = s->hidden_dim;
    c.head_dim = s->head_dim;
    c.ratio = s->ratio;
    c.rope_dim = s->rope_dim;
    c.overlap = s->overlap;
    c.no_ape = s->no_ape;
    c.no_gate = s->no_gate;
    c.rounding = s->rounding;
    c.sums = s->sums;
    c.yarn_factor = s->overlap ? 16 : 0;
    return c;
}

SUPPORT model shape_model(const shape *s, uint64_t seed) {
    dsv4_config c = shape_config(s);
    return model_new(&c, s->param, seed);
}

SUPPORT sequence shape_sequence(const shape *s, int64_t tokens, uint64_t seed) {
    dsv4_config c = shape_config(s);
    return sequence_new(&c, s->x, tokens, seed);
}

/* A shape at work: a compressor of it, and a sequence with the results of its one call. */
typedef struct workbench {
    dsv4_config config;
    dsv4_dtype out_dtype;
    model m;
    engine e;
    sequence s;
    results whole;
} workbench;

SUPPORT results workbench_results(const workbench *w) {
    return results_new(&w->config, w->out_dtype, w->s.tokens, w->s.tokens / w->config.ratio);
}

SUPPORT workbench workbench_new(const shape *of, int64_t windows, uint64_t seed) {
    workbench w = {0};
    w.config = shape_config(of);
    w.out_dtype = of->out;
    w.m = shape_model(of, seed);
    w.e = engine_new(&w.m, NULL, NULL);
    w.s = shape_sequence(of, windows * w.config.ratio, seed + 1);
    w.s.position = 1000;
    w.whole = workbench_results(&w);
    dsv4_error error = {0};
    if (compress_whole(&w.e, &w.s, &w.whole, &error) != DSV4_OK) {
        fprintf(stderr, "tests: %s: %s\n", of->name, error.text);
        exit(1);
    }
    return w;
}

SUPPORT void workbench_free(workbench *w) {
    results_free(&w->whole);
    sequence_free(&w->s);
    engine_free(&w->e);
    model_free(&w->m);
}

#endif /* TESTS_SHAPES_H */
