/* The two orders in which products of bf16 are added up, PAIRS and TILES, beside loops that do as their definitions
 * say: projections, dx and the weights' gradients, to the bit, for every kernel set. */

#include "runner.h"
#include "gradient_support.h"

/* ---- The definitions --------------------------------------------------------------------------------------- */

/* `count` products of bf16 numbers, each exact in fp32; sums are rounded one by one. */
typedef struct terms {
    const float *a, *b;
    int64_t a_stride, b_stride, count;
} terms;

static float product_of(const terms *t, int64_t k) {
    return k < t->count ? t->a[k * t->a_stride] * t->b[k * t->b_stride] : 0.0f;
}

static float plus(float a, float b) {
    volatile float sum = a + b;
    return sum;
}

/* Blocks of 256, the odd term of each pair first. */
static float sum_of_pairs(const terms *t) {
    float total = 0;
    for (int64_t block = 0; block < t->count; block += 256) {
        float sum = 0;
        for (int64_t k = block; k < block + 256 && k < t->count; k += 2)
            sum = plus(plus(sum, product_of(t, k + 1)), product_of(t, k));
        total = block == 0 ? sum : plus(total, sum);
    }
    return total;
}

/* Steps of 32: 16 even terms, 16 odd ones, and the sum of both onto the total. */
static float sum_of_tiles(const terms *t) {
    float total = 0;
    for (int64_t step = 0; step < t->count; step += 32) {
        float even = 0, odd = 0;
        for (int64_t k = step; k < step + 32; k += 2) {
            even = plus(even, product_of(t, k));
            odd = plus(odd, product_of(t, k + 1));
        }
        total = plus(total, plus(even, odd));
    }
    return total;
}

static float sum_as(dsv4_sums sums, terms t) { return sums == DSV4_SUMS_TILES ? sum_of_tiles(&t) : sum_of_pairs(&t); }

/* An array of bf16 numbers. */
static float *as_floats(workbench *w, const void *data, int64_t count) {
    float *floats = workbench_memory(w, (size_t)count * sizeof *floats);
    for (int64_t i = 0; i < count; i++) floats[i] = (float)number(data, DSV4_BF16, i);
    return floats;
}

/* ---- Projections ------------------------------------------------------------------------------------------- */

static dsv4_config plain_config(dsv4_sums sums, int64_t hidden_dim, int64_t head_dim) {
    return (dsv4_config){
        .hidden_dim = hidden_dim, .head_dim = head_dim, .ratio = 1, .no_ape = 1, .no_gate = 1, .sums = sums};
}

/* The first of kv's numbers that is not the sum that its definition gives, -1 where all are. */
static int64_t wrong_projection(const dsv4_config *c, int64_t tokens, const char *isa) {
    workbench w = workbench_with(model_of(c, DSV4_BF16, 21), sequence_new(c, DSV4_BF16, tokens, 22), DSV4_F32);
    engine e = workbench_engine(&w, isa, NULL);
    results r = workbench_results(&w);
    float *x = as_floats(&w, w.s.x, tokens * c->hidden_dim);
    float *weights = as_floats(&w, w.m.data[DSV4_WKV], w.m.info[DSV4_WKV].count);
    int64_t wrong = compress_whole(&e, &w.s, &r, NULL) == DSV4_OK ? -1 : 0;
    for (int64_t i = 0; i < r.count[STAGE_KV] && wrong < 0; i++) {
        const int64_t token = i / c->head_dim, column = i % c->head_dim, terms_of_each = c->hidden_dim;
        const terms t = {x + token * terms_of_each, weights + column * terms_of_each, 1, 1, terms_of_each};
        if (bits_of_float(sum_as(c->sums, t)) != bits_of_float(((float *)r.stage[STAGE_KV])[i])) wrong = i;
    }
    workbench_free(&w);
    return wrong;
}

/* Any number of terms, and any number of rows that are multiplied at a time. */
TEST projections_are_added_in_the_order_named(dsv4_sums sums) {
    static const int64_t dims[] = {1,  2,  3,  15,  16,  17,  30,  31,  32,  33,  47,  48,  62,   63,
                                   64, 65, 96, 129, 255, 256, 257, 288, 300, 511, 513, 777, 2080, 4101};
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
            dsv4_config c = plain_config(sums, dims[i], 1 + (int64_t)(i * 7) % 40);
            const int64_t wrong = wrong_projection(&c, 1 + (int64_t)(i * 5) % 19, isa);
            ASSERTm(note("%s: %d terms: number %d", isa, (int)dims[i], (int)wrong), wrong < 0);
        }
        for (int64_t rows = 1; rows <= 70; rows += rows < 34 ? 1 : 7) {
            dsv4_config c = plain_config(sums, 71, 33);
            const int64_t wrong = wrong_projection(&c, rows, isa);
            ASSERTm(note("%s: %d rows: number %d", isa, (int)rows, (int)wrong), wrong < 0);
        }
    }
    PASS();
}

/* ---- Gradients --------------------------------------------------------------------------------------------- */

/* dkv of a workbench whose windows have one row, read off dwkv of single tokens of ones. */
static float *dkv_of(workbench *w) {
    const dsv4_config *c = &w->config;
    float *dkv = workbench_memory(w, (size_t)(w->s.tokens * c->head_dim) * sizeof *dkv);
    float *dwkv = workbench_memory(w, (size_t)(c->head_dim * c->hidden_dim) * sizeof *dwkv);
    dsv4_bf16 *ones = workbench_memory(w, (size_t)c->hidden_dim * sizeof *ones);
    results r = workbench_results_in(w, DSV4_F32);
    for (int64_t i = 0; i < c->hidden_dim; i++) ones[i] = 0x3F80;
    if (compress_whole(&w->e, &w->s, &r, NULL) != DSV4_OK) exit(1);
    for (int64_t t = 0; t < w->s.tokens; t++) {
        const char *dout = (const char *)w->dout + (size_t)(t * c->head_dim) * dsv4_dtype_size(w->out_dtype);
        dsv4_batch b = {.x = {ones, DSV4_BF16, 0}, .tokens = 1, .entries = 1};
        dsv4_gradients to = {.dout = {dout, w->out_dtype, 0}, .dwkv = {dwkv, DSV4_F32, 0}};
        b.kv = (float *)r.stage[STAGE_KV] + t * c->head_dim;
        if (workbench_backward(w, &b, &to) != DSV4_OK) exit(1);
        for (int64_t i = 0; i < c->head_dim; i++) dkv[t * c->head_dim + i] = dwkv[i * c->hidden_dim];
    }
    return dkv;
}

/* What dx and dwkv have to be: sums over dkv's columns and over the tokens. */
static gradient_set expected_gradients(workbench *w) {
    const int64_t H = w->config.hidden_dim, D = w->config.head_dim, tokens = w->s.tokens;
    gradient_set g = workbench_gradients(w, DSV4_F32);
    float *dkv = dkv_of(w), *x = as_floats(w, w->s.x, tokens * H);
    float *weights = as_floats(w, w->m.data[DSV4_WKV], D * H);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < H; h++)
            ((float *)g.data[ORACLE_DX])[t * H + h] =
                sum_as(w->config.sums, (terms){dkv + t * D, weights + h, 1, H, D});
    for (int64_t d = 0; d < D; d++)
        for (int64_t h = 0; h < H; h++)
            ((float *)g.data[ORACLE_DWKV])[d * H + h] = sum_as(w->config.sums, (terms){dkv + d, x + h, D, H, tokens});
    return g;
}

TEST gradients_are_added_in_the_order_named(dsv4_sums sums) {
    static const int64_t sizes[][3] = {{40, 70, 300}, {33, 33, 31}, {1, 2, 65},
                                       {70, 300, 70}, {64, 64, 1},  {35, 17, 560}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        dsv4_config c = plain_config(sums, sizes[i][0], sizes[i][1]);
        workbench w = training_for(&c, DSV4_BF16, DSV4_F32, sizes[i][2], 31);
        gradient_set expected = expected_gradients(&w);
        for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
            engine e = workbench_trainer(&w, isa, NULL);
            gradient_set got = workbench_gradients(&w, DSV4_F32);
            ASSERT_EQ(DSV4_OK, backward_whole(&w, &e, &got));
            for (int which = ORACLE_DX; which <= ORACLE_DWKV; which++)
                ASSERTm(note("%s of %d tokens: %s", gradient_name(which), (int)w.s.tokens, isa),
                        memcmp(expected.data[which], got.data[which], got.bytes[which]) == 0);
        }
        workbench_free(&w);
    }
    PASS();
}

/* A compressor whose sums over tokens are told apart by where they are cut. */
static workbench tiles_case(int64_t tokens) {
    const dsv4_config c = {.hidden_dim = 37, .head_dim = 33, .ratio = 4, .overlap = 1, .sums = DSV4_SUMS_TILES};
    return training_for(&c, DSV4_BF16, DSV4_F32, tokens, 41);
}

/* The first gradient from dwkv to `last` that differs between the cuts, for some kernel set. */
static int cuts_differ(workbench *w, const int64_t *some, const int64_t *others, int count, int last) {
    int found = GRADIENTS;
    for (const char *isa = dsv4_isa_name(0); isa && found == GRADIENTS; isa = isa_after(isa)) {
        engine e = workbench_trainer(w, isa, NULL);
        gradient_set a = workbench_gradients(w, DSV4_F32), b = workbench_gradients(w, DSV4_F32);
        if (backward_cut(w, &e, some, count, &a) != DSV4_OK || backward_cut(w, &e, others, count, &b) != DSV4_OK)
            found = ORACLE_DX;
        for (int which = ORACLE_DX; which <= last && found == GRADIENTS; which++)
            if (memcmp(a.data[which], b.data[which], a.bytes[which]) != 0) found = which;
    }
    return found;
}

TEST cuts_at_multiples_of_32_give_the_same_sums_of_tiles(void) {
    static const int64_t whole[] = {100000, 1, 1, 1},
                         cuts[][4] = {{32, 32, 32, 32}, {96, 64, 352, 32}, {224, 64, 32, 160}};
    workbench w = tiles_case(700);
    for (int i = 0; i < 3; i++) {
        const int found = cuts_differ(&w, whole, cuts[i], 4, ORACLE_DWGATE);
        ASSERTm(note("cut %d: %s", i, gradient_name(found)), found == GRADIENTS);
    }
    workbench_free(&w);
    PASS();
}

/* Wherever a part begins: cutting one up at multiples of 32 of its sequence changes nothing. */
TEST steps_are_counted_from_the_first_token(void) {
    static const int64_t once[] = {41, 100000, 1, 1}, often[] = {41, 23, 128, 100000};
    workbench w = tiles_case(340);
    const int found = cuts_differ(&w, once, often, 4, ORACLE_DWGATE);
    ASSERTm(gradient_name(found), found == GRADIENTS);
    workbench_free(&w);
    PASS();
}

/* ---- Tiles ------------------------------------------------------------------------------------------------- */

static int is_listed(const char *isa) {
    int i = 0;
    while (dsv4_isa_name(i) && strcmp(dsv4_isa_name(i), isa) != 0) i++;
    return dsv4_isa_name(i) != NULL;
}

/* Unasked, the order TILES gets tiles wherever there are any, and the order PAIRS never does: the system is not
 * asked. */
TEST tiles_are_for_the_order_that_is_theirs(dsv4_sums sums) {
    dsv4_config c = plain_config(sums, 64, 32);
    workbench w = workbench_for(&c, DSV4_BF16, 0, 71);
    ASSERT_STR_EQ(best_isa(sums), dsv4_compressor_isa(w.e.compressor));
    workbench_free(&w);
    PASS();
}

/* Sizes that neither tiles nor what is added up before sums are stored divide. */
static workbench tiled_case(int64_t tokens) {
    const dsv4_config c = {.hidden_dim = 2200, .head_dim = 300, .ratio = 4, .overlap = 1, .sums = DSV4_SUMS_TILES};
    return training_for(&c, DSV4_BF16, DSV4_F32, tokens, 81);
}

TEST the_cpus_tiles_do_as_their_model_does(void) {
    if (!is_listed("amx")) SKIPm("this CPU, or its system, has no AMX");
    static const char *const sets[] = {"amx", "amx-model", "scalar"};
    for (int64_t tokens = 4; tokens <= 301; tokens += tokens < 40 ? 4 : 87) {
        workbench w = tiled_case(tokens);
        results r[3];
        for (int i = 0; i < 3; i++) {
            engine e = workbench_trainer(&w, sets[i], NULL);
            gradient_set g = workbench_gradients(&w, DSV4_F32);
            r[i] = workbench_results(&w);
            ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r[i], NULL));
            ASSERT_EQ(DSV4_OK, backward_whole(&w, &e, &g));
            ASSERT_EQ_FMT((int)STAGE_COUNT, results_difference(&r[0], &r[i]), "%d");
            ASSERT_EQ_FMT((int)GRADIENTS, gradient_difference(&w.gradients, &g, ORACLE_DX), "%d");
        }
        workbench_free(&w);
    }
    PASS();
}

/* Hidden widths that blocks of 256 terms do not divide, by more rows than are multiplied at a time: whatever is packed
 * has its place. */
TEST tiles_of_any_width_give_the_same(int64_t hidden_dim) {
    static const char *const sets[] = {"amx", "amx-model"};
    const dsv4_config c = {.hidden_dim = hidden_dim, .head_dim = 24, .ratio = 4, .sums = DSV4_SUMS_TILES};
    workbench w = training_for(&c, DSV4_BF16, DSV4_F32, 300, 91);
    engine scalar = workbench_trainer(&w, "scalar", NULL);
    gradient_set expected = workbench_gradients(&w, DSV4_F32);
    results of_scalar = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&scalar, &w.s, &of_scalar, NULL));
    ASSERT_EQ(DSV4_OK, backward_whole(&w, &scalar, &expected));
    for (int i = 0; i < 2; i++) {
        if (!is_listed(sets[i])) continue;
        engine e = workbench_trainer(&w, sets[i], NULL);
        gradient_set g = workbench_gradients(&w, DSV4_F32);
        results r = workbench_results(&w);
        ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
        ASSERT_EQ(DSV4_OK, backward_whole(&w, &e, &g));
        ASSERT_EQ_FMT((int)STAGE_COUNT, results_difference(&of_scalar, &r), "%d");
        ASSERT_EQ_FMT((int)GRADIENTS, gradient_difference(&expected, &g, ORACLE_DX), "%d");
    }
    workbench_free(&w);
    PASS();
}

/* With tiles, what a workspace holds follows from the weights' types. */
TEST tiles_share_no_workspace_with_fp32_weights(void) {
    const dsv4_config c = {.hidden_dim = 4096, .head_dim = 16, .ratio = 4, .sums = DSV4_SUMS_TILES};
    workbench w[2];
    engine e[2];
    for (int i = 0; i < 2; i++) {
        w[i] = workbench_for(&c, i ? DSV4_F32 : DSV4_BF16, 40, 92);
        e[i] = workbench_engine(&w[i], "amx-model", NULL);
    }
    for (int i = 0; i < 2; i++) {
        const engine mixed = {.compressor = e[i].compressor, .workspace = e[!i].workspace};
        results r = workbench_results(&w[i]);
        ASSERT_EQ(DSV4_ERROR_ARGUMENT, compress_whole(&mixed, &w[i].s, &r, NULL));
        ASSERT_EQ(DSV4_OK, compress_whole(&e[i], &w[i].s, &r, NULL));
    }
    for (int i = 0; i < 2; i++) workbench_free(&w[i]);
    PASS();
}

/* ---- What the order is not --------------------------------------------------------------------------------- */

/* An fp32 operand is multiplied the same way whatever the order: dx and sums over tokens too. */
TEST fp32_operands_know_no_order(dsv4_dtype x, dsv4_dtype weights) {
    dsv4_config c = {.hidden_dim = 300, .head_dim = 40, .ratio = 3};
    workbench w[2];
    results r[2];
    for (int i = 0; i < 2; i++) {
        c.sums = i ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
        w[i] = training_with(model_of(&c, weights, 51), sequence_new(&c, x, 299, 52), DSV4_F32, 53);
        r[i] = workbench_results(&w[i]);
        ASSERT_EQ(DSV4_OK, compress_whole(&w[i].e, &w[i].s, &r[i], NULL));
    }
    const int same = results_difference(&r[0], &r[1]) == STAGE_COUNT &&
                     gradient_difference(&w[0].gradients, &w[1].gradients, ORACLE_DX) == GRADIENTS;
    ASSERT_EQ(x == DSV4_F32 || weights == DSV4_F32, same);
    for (int i = 0; i < 2; i++) workbench_free(&w[i]);
    PASS();
}

SUITE(sums) {
    static const struct {
        const char *name;
        dsv4_sums sums;
    } orders[] = {{"pairs", DSV4_SUMS_PAIRS}, {"tiles", DSV4_SUMS_TILES}};
    for (int i = 0; i < 2; i++) {
        RUN_NAMED(orders[i].name, projections_are_added_in_the_order_named, orders[i].sums);
        RUN_NAMED(orders[i].name, gradients_are_added_in_the_order_named, orders[i].sums);
        RUN_NAMED(orders[i].name, tiles_are_for_the_order_that_is_theirs, orders[i].sums);
    }
    RUN_TEST(cuts_at_multiples_of_32_give_the_same_sums_of_tiles);
    RUN_TEST(steps_are_counted_from_the_first_token);
    RUN_TEST(the_cpus_tiles_do_as_their_model_does);
    RUN_NAMED("544", tiles_of_any_width_give_the_same, 544);
    RUN_NAMED("1056", tiles_of_any_width_give_the_same, 1056);
    RUN_NAMED("2016", tiles_of_any_width_give_the_same, 2016);
    RUN_TEST(tiles_share_no_workspace_with_fp32_weights);
    for (int x = DSV4_F32; x <= DSV4_BF16; x++)
        for (int w = DSV4_F32; w <= DSV4_BF16; w++) {
            const char *mixed = x == DSV4_F32 ? "f32_x" : "bf16_x";
            RUN_NAMED(x == w ? dtype_name((dsv4_dtype)x) : mixed, fp32_operands_know_no_order, (dsv4_dtype)x,
                      (dsv4_dtype)w);
        }
}

TESTS_MAIN(sums);
