/* shapes.h - the table of small compressors that the suites of streams and of bits go through: every rounding preset,
 * every mix of types, odd sizes, overlap with any ratio. */

#ifndef TESTS_SHAPES_H
#define TESTS_SHAPES_H

#include "support.h"

typedef struct shape {
    const char *name;
    dsv4_config config;
    dsv4_dtype param[DSV4_PARAM_COUNT], x, out;
    int64_t tokens; /* of the sequences it is for; 0: a few windows are enough */
} shape;

#define F DSV4_F32
#define B DSV4_BF16
#define P DSV4_SUMS_PAIRS
#define T DSV4_SUMS_TILES
/* clang-format off */
#define CONFIG(h, d, m, r, look_back, ape, gate, points, order) {                                   \
    .hidden_dim = h, .head_dim = d, .ratio = m, .rope_dim = r, .overlap = look_back, .no_ape = ape, \
    .no_gate = gate, .rounding = DSV4_##points, .sums = order, .yarn_factor = look_back ? 16 : 0}
static const shape shapes[] = {
    /* name                        H     D     m     R  overlap, no_ape, no_gate, rounding, sums  wkv gate ape norm
     * x out tokens */
    {"csa_bf16",           CONFIG(  64,   40,    4,   16, 1, 0, 0, ROUNDING_DEEPSEEK, P),     {B, B, F, B}, B, B, 0},
    {"csa_f32",            CONFIG(  48,   24,    4,    8, 1, 0, 0, ROUNDING_NONE, P),         {F, F, F, F}, F, F, 0},
    {"csa_odd",            CONFIG(  37,   23,    4,    6, 1, 0, 0, ROUNDING_MAXTEXT, P),      {B, F, B, F}, F, B, 0},
    {"csa_two_blocks",     CONFIG( 515,   17,    4,    2, 1, 0, 0, ROUNDING_NONE, P),         {B, B, B, B}, B, F, 0},
    {"overlap_ratio_1",    CONFIG(  33,   12,    1,    4, 1, 0, 0, ROUNDING_TRANSFORMERS, P), {F, B, F, B}, B, B, 0},
    {"overlap_ratio_3",    CONFIG(  16,   35,    3,   34, 1, 1, 0, ROUNDING_NONE, P),         {B, B, F, F}, F, F, 0},
    {"overlap_ratio_9",    CONFIG(  20,    5,    9,    4, 1, 0, 0, ROUNDING_DEEPSEEK, P),     {F, F, B, B}, B, F, 0},
    {"hca_bf16",           CONFIG(  64,   33,   16,   32, 0, 0, 0, ROUNDING_TRANSFORMERS, P), {B, B, F, B}, B, B, 0},
    {"hca_f32",            CONFIG( 300,   16,    8,    0, 0, 0, 0, ROUNDING_NONE, P),         {F, F, F, F}, F, F, 0},
    {"hca_mixed",          CONFIG(  29,   31,    5,   10, 0, 0, 0, ROUND_WEIGHT, P),          {F, B, B, F}, F, B, 0},
    {"v41_ratio_2",        CONFIG(  40,   32,    2,   16, 0, 1, 0, ROUNDING_DEEPSEEK, P),     {B, B, B, B}, B, B, 0},
    {"v41_ratio_1",        CONFIG(  40,   32,    1,   16, 0, 1, 1, ROUNDING_DEEPSEEK, P),     {B, B, B, B}, B, B, 0},
    {"ratio_1_gated",      CONFIG(  19,    7,    1,    2, 0, 0, 0, ROUNDING_MAXTEXT, P),      {F, F, F, F}, F, F, 0},
    {"one_number",         CONFIG(   1,    1,    2,    0, 1, 0, 0, ROUNDING_NONE, P),         {F, F, F, F}, F, F, 0},
    {"csa_tiles",          CONFIG(  64,   40,    4,   16, 1, 0, 0, ROUNDING_DEEPSEEK, T),     {B, B, F, B}, B, B, 0},
    {"hca_tiles",          CONFIG(  77,   33,    7,   32, 0, 0, 0, ROUNDING_NONE, T),         {B, B, F, F}, B, F, 0},
    {"tiles_two_blocks",   CONFIG( 517,   17,    3,    2, 1, 0, 0, ROUNDING_MAXTEXT, T),      {F, B, B, B}, B, B, 0},
    {"tiles_ratio_1",      CONFIG(  33,   49,    1,   16, 0, 1, 1, ROUNDING_DEEPSEEK, T),     {B, B, B, B}, B, B, 0},
    {"tiles_mixed",        CONFIG(  45,   20,    5,    4, 1, 0, 0, ROUNDING_TRANSFORMERS, T), {B, F, F, F}, B, F, 0},
    {"tiles_f32",          CONFIG(  48,   24,    4,    8, 1, 0, 0, ROUNDING_NONE, T),         {F, F, F, F}, F, F, 0},
};

/* For sequences of many hundred tokens: more than what is worked on at a time, windows longer than that among them. */
static const shape long_shapes[] = {
    {"csa_long",           CONFIG( 258,  130,    4,   64, 1, 0, 0, ROUNDING_DEEPSEEK, P),     {B, B, F, B}, B, B, 900},
    {"csa_long_f32",       CONFIG( 130,   65,    4,   16, 1, 0, 0, ROUNDING_NONE, P),         {F, F, F, F}, F, F, 900},
    {"hca_ratio_128",      CONFIG(  64,   70,  128,    8, 0, 0, 0, ROUNDING_MAXTEXT, P),      {B, B, F, B}, B, B, 900},
    {"overlap_ratio_300",  CONFIG(  31,   34,  300,    8, 1, 0, 0, ROUNDING_NONE, P),         {F, B, F, B}, F, F, 900},
    {"ratio_1_long",       CONFIG(  40,   33,    1,   16, 0, 1, 1, ROUNDING_DEEPSEEK, P),     {B, B, B, B}, B, B, 900},
    {"csa_tiles_long",     CONFIG( 290,  130,    4,   64, 1, 0, 0, ROUNDING_DEEPSEEK, T),     {B, B, F, B}, B, B, 900},
    {"hca_tiles_long",     CONFIG(  63,   35,  128,    8, 0, 0, 0, ROUNDING_NONE, T),         {B, B, F, B}, B, F, 900},
    {"ratio_1_tiles_long", CONFIG(2100,    9,    1,    4, 0, 1, 1, ROUNDING_DEEPSEEK, T),     {B, B, B, B}, B, B, 900},
};

/* The oddest sizes. */
static const shape odd_shapes[] = {
    {"ratio_4096",         CONFIG(   1,    1, 4096,    0, 0, 0, 0, ROUNDING_NONE, P),         {F, F, F, F}, F, F, 0},
    {"overlap_4096",       CONFIG(   2,    3, 4096,    2, 1, 0, 0, ROUNDING_MAXTEXT, P),      {B, F, F, F}, F, B, 0},
    {"head_dim_1",         CONFIG(   5,    1,    4,    0, 1, 0, 0, ROUNDING_NONE, P),         {F, F, F, F}, B, F, 0},
    {"hidden_dim_1",       CONFIG(   1,   40,    1,    2, 1, 0, 0, ROUNDING_NONE, P),         {B, B, B, B}, B, B, 0},
    {"wide",               CONFIG(   3, 1030,    2, 1030, 1, 0, 0, ROUNDING_DEEPSEEK, T),     {B, B, F, B}, B, B, 0},
    {"tall",               CONFIG(9001,    2,    3,    2, 0, 0, 0, ROUNDING_NONE, P),         {F, F, F, F}, F, F, 0},
};
/* clang-format on */
#undef F
#undef B
#undef P
#undef T
#undef CONFIG
enum {
    SHAPE_COUNT = sizeof shapes / sizeof *shapes,
    LONG_SHAPE_COUNT = sizeof long_shapes / sizeof *long_shapes,
    ODD_SHAPE_COUNT = sizeof odd_shapes / sizeof *odd_shapes
};

/* No multiple of any vector: `tail` more than one of 16 channels' and terms. */
SUPPORT shape tail_shape(int tail, int64_t ratio, int64_t rope_dim, dsv4_dtype x, dsv4_dtype out) {
    shape of = {.name = "", .x = x, .out = out};
    of.config.hidden_dim = 16 + tail;
    of.config.head_dim = 17 + tail;
    of.config.ratio = ratio;
    of.config.rope_dim = rope_dim;
    of.config.overlap = tail % 2;
    of.config.yarn_factor = tail % 2 ? 16 : 0;
    of.config.sums = tail % 2 ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
    return of;
}

/* Windows of a sequence for it: as many as a long one has, or `few`. */
SUPPORT int64_t shape_windows(const shape *of, int64_t few) { return of->tokens ? of->tokens / of->config.ratio : few; }

SUPPORT model shape_model(const shape *of, uint64_t seed) { return model_new(&of->config, of->param, seed); }

SUPPORT sequence shape_sequence(const shape *of, int64_t tokens, uint64_t seed) {
    return sequence_new(&of->config, of->x, tokens, seed);
}

/* Tests of every shape `of`, by its name: FOR_EVERY_SHAPE(test, of, other arguments) */
#define FOR_SHAPES(table, count, ...) \
    for (const shape *of = table; of < table + count; of++) RUN_NAMED(of->name, __VA_ARGS__)
#define FOR_EVERY_SHAPE(...)      FOR_SHAPES(shapes, SHAPE_COUNT, __VA_ARGS__)
#define FOR_EVERY_LONG_SHAPE(...) FOR_SHAPES(long_shapes, LONG_SHAPE_COUNT, __VA_ARGS__)
#define FOR_SHORT_AND_LONG_SHAPES(...) \
    FOR_EVERY_SHAPE(__VA_ARGS__);      \
    FOR_EVERY_LONG_SHAPE(__VA_ARGS__)

#endif /* TESTS_SHAPES_H */
