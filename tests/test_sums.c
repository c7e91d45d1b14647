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

static float *as_floats(const void *data, dsv4_dtype dtype, int64_t count) {
    float *floats = reserve((size_t)count * sizeof *floats);
    for (int64_t i = 0; i < count; i++) floats[i] = (float)number(data, dtype, i);
    return floats;
}

/* ---- Projections ------------------------------------------------------------------------------------------- */

static dsv4_config plain_config(dsv4_sums sums, int64_t hidden_dim, int64_t head_dim) {
    dsv4_config c = {0};
    c.hidden_dim = hidden_dim;
    c.head_dim = head_dim;
    c.ratio = 1;
    c.no_ape = c.no_gate = 1;
    c.sums = sums;
    return c;
}

/* The first of kv's numbers that is not the sum that its definition gives, -1 where all are. */
static int64_t wrong_projection(const dsv4_config *c, int64_t tokens, const char *isa) {
    model m = model_of(c, DSV4_BF16, 21);
    sequence s = sequence_new(c, DSV4_BF16, tokens, 22);
    engine e = engine_new(&m, isa, NULL);
    results r = results_new(c, DSV4_F32, tokens, tokens);
    float *x = as_floats(s.x, DSV4_BF16, tokens * c->hidden_dim);
    float *w = as_floats(m.data[DSV4_WKV], DSV4_BF16, m.info[DSV4_WKV].count);
    int64_t wrong = compress_whole(&e, &s, &r, NULL) == DSV4_OK ? -1 : 0;
    for (int64_t i = 0; i < r.count[STAGE_KV] && wrong < 0; i++) {
        const terms t = {x + i / c->head_dim * c->hidden_dim, w + i % c->head_dim * c->hidden_dim, 1, 1, c->hidden_dim};
        if (bits_of_float(sum_as(c->sums, t)) != bits_of_float(((float *)r.stage[STAGE_KV])[i])) wrong = i;
    }
    free(w);
    free(x);
    results_free(&r);
    engine_free(&e);
    sequence_free(&s);
    model_free(&m);
    return wrong;
}

/* Any number of terms, and any number of rows that are multiplied at a time. */
TEST projections_are_added_in_the_order_named(dsv4_sums sums) {
    static const int64_t dims[] = {1,  2,  3,  15,  16,  17,  30,  31,  32,  33,  47,  48,  62,   63,
                                   64, 65, 96, 129, 255, 256, 257, 288, 300, 511, 513, 777, 2080, 4101};
    const char *isa;
    for (int k = 0; (isa = dsv4_isa_name(k)) != NULL; k++) {
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

/* dkv of a backward_case whose windows have one row, read off dwkv of single tokens of ones. */
static float *dkv_of(const backward_case *l) {
    const dsv4_config *c = &l->config;
    float *dkv = reserve((size_t)(l->s.tokens * c->head_dim) * sizeof *dkv);
    float *dwkv = reserve((size_t)(c->head_dim * c->hidden_dim) * sizeof *dwkv);
    dsv4_bf16 *ones = reserve((size_t)c->hidden_dim * sizeof *ones);
    results r = results_new(c, DSV4_F32, l->s.tokens, l->entries);
    for (int64_t i = 0; i < c->hidden_dim; i++) ones[i] = 0x3F80;
    if (compress_whole(&l->e, &l->s, &r, NULL) != DSV4_OK) exit(1);
    for (int64_t t = 0; t < l->s.tokens; t++) {
        dsv4_batch b = {0};
        dsv4_gradients to = {0};
        b.x = (dsv4_const_matrix){ones, DSV4_BF16, 0};
        b.kv = (float *)r.stage[STAGE_KV] + t * c->head_dim;
        b.tokens = b.entries = 1;
        to.dout = (dsv4_const_matrix){(char *)l->dout + (size_t)(t * c->head_dim) * dsv4_dtype_size(l->dout_dtype),
                                      l->dout_dtype, 0};
        to.dwkv = matrix_of(dwkv, DSV4_F32);
        if (dsv4_backward(l->e.compressor, &b, &to, l->e.workspace, NULL) != DSV4_OK) exit(1);
        for (int64_t i = 0; i < c->head_dim; i++) dkv[t * c->head_dim + i] = dwkv[i * c->hidden_dim];
    }
    results_free(&r);
    free(ones);
    free(dwkv);
    return dkv;
}

/* What dx and dwkv have to be: sums over dkv's columns and over the tokens. */
static gradient_set expected_gradients(const backward_case *l) {
    const int64_t H = l->config.hidden_dim, D = l->config.head_dim, tokens = l->s.tokens;
    gradient_set g = gradient_set_new(&l->config, DSV4_F32, tokens);
    float *dkv = dkv_of(l), *x = as_floats(l->s.x, DSV4_BF16, tokens * H);
    float *w = as_floats(l->m.data[DSV4_WKV], DSV4_BF16, D * H);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < H; h++)
            ((float *)g.data[ORACLE_DX])[t * H + h] = sum_as(l->config.sums, (terms){dkv + t * D, w + h, 1, H, D});
    for (int64_t d = 0; d < D; d++)
        for (int64_t h = 0; h < H; h++)
            ((float *)g.data[ORACLE_DWKV])[d * H + h] = sum_as(l->config.sums, (terms){dkv + d, x + h, D, H, tokens});
    free(w);
    free(x);
    free(dkv);
    return g;
}

TEST gradients_are_added_in_the_order_named(dsv4_sums sums) {
    static const int64_t sizes[][3] = {{40, 70, 300}, {33, 33, 31}, {1, 2, 65},
                                       {70, 300, 70}, {64, 64, 1},  {35, 17, 560}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        dsv4_config c = plain_config(sums, sizes[i][0], sizes[i][1]);
        backward_case l =
            backward_case_new(model_of(&c, DSV4_BF16, 31), sequence_new(&c, DSV4_BF16, sizes[i][2], 32), DSV4_F32, 33);
        gradient_set expected = expected_gradients(&l);
        const char *isa;
        for (int k = 0; (isa = dsv4_isa_name(k)) != NULL; k++) {
            engine e = trainer_new(&l.m, isa, NULL);
            gradient_set got = gradient_set_new(&c, DSV4_F32, l.s.tokens);
            ASSERT_EQ(DSV4_OK, backward_whole(&l, &e, &got));
            for (int which = ORACLE_DX; which <= ORACLE_DWKV; which++)
                ASSERTm(note("%s of %d tokens: %s", gradient_name(which), (int)l.s.tokens, isa),
                        memcmp(expected.data[which], got.data[which], got.bytes[which]) == 0);
            gradient_set_free(&got);
            engine_free(&e);
        }
        gradient_set_free(&expected);
        backward_case_free(&l);
    }
    PASS();
}

/* A compressor whose sums over tokens are told apart by where they are cut. */
static backward_case tiles_lesson(int64_t tokens) {
    dsv4_config c = {0};
    c.hidden_dim = 37;
    c.head_dim = 33;
    c.ratio = 4;
    c.overlap = 1;
    c.sums = DSV4_SUMS_TILES;
    return backward_case_new(model_of(&c, DSV4_BF16, 41), sequence_new(&c, DSV4_BF16, tokens, 42), DSV4_F32, 43);
}

/* The first gradient from dwkv to `last` that differs between the cuts, for some kernel set. */
static int cuts_differ(const backward_case *l, const int64_t *some, const int64_t *others, int count, int last) {
    const char *isa;
    int found = GRADIENTS;
    for (int k = 0; (isa = dsv4_isa_name(k)) != NULL && found == GRADIENTS; k++) {
        engine e = trainer_new(&l->m, isa, NULL);
        gradient_set a = gradient_set_new(&l->config, DSV4_F32, l->s.tokens);
        gradient_set b = gradient_set_new(&l->config, DSV4_F32, l->s.tokens);
        if (backward_cut(l, &e, some, count, &a) != DSV4_OK || backward_cut(l, &e, others, count, &b) != DSV4_OK)
            found = ORACLE_DX;
        for (int which = ORACLE_DX; which <= last && found == GRADIENTS; which++)
            if (memcmp(a.data[which], b.data[which], a.bytes[which]) != 0) found = which;
        gradient_set_free(&b);
        gradient_set_free(&a);
        engine_free(&e);
    }
    return found;
}

TEST cuts_at_multiples_of_32_give_the_same_sums_of_tiles(void) {
    static const int64_t whole[] = {100000, 1, 1, 1},
                         cuts[][4] = {{32, 32, 32, 32}, {96, 64, 352, 32}, {224, 64, 32, 160}};
    backward_case l = tiles_lesson(700);
    for (int i = 0; i < 3; i++) {
        const int found = cuts_differ(&l, whole, cuts[i], 4, ORACLE_DWGATE);
        ASSERTm(note("cut %d: %s", i, gradient_name(found)), found == GRADIENTS);
    }
    backward_case_free(&l);
    PASS();
}

/* Wherever a part begins: cutting one up at multiples of 32 of its sequence changes nothing. */
TEST steps_are_counted_from_the_first_token(void) {
    static const int64_t once[] = {41, 100000, 1, 1}, often[] = {41, 23, 128, 100000};
    backward_case l = tiles_lesson(340);
    const int found = cuts_differ(&l, once, often, 4, ORACLE_DWGATE);
    ASSERTm(gradient_name(found), found == GRADIENTS);
    backward_case_free(&l);
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
    model m = model_of(&c, DSV4_BF16, 71);
    engine e = engine_new(&m, NULL, NULL);
    ASSERT_STR_EQ(best_isa(sums), dsv4_compressor_isa(e.compressor));
    engine_free(&e);
    model_free(&m);
    PASS();
}

/* Sizes that neither tiles nor what is added up before sums are stored divide. */
static backward_case tiled_lesson(int64_t tokens) {
    dsv4_config c = {0};
    c.hidden_dim = 2200;
    c.head_dim = 300;
    c.ratio = 4;
    c.overlap = 1;
    c.sums = DSV4_SUMS_TILES;
    return backward_case_new(model_of(&c, DSV4_BF16, 81), sequence_new(&c, DSV4_BF16, tokens, 82), DSV4_F32, 83);
}

TEST the_cpus_tiles_do_as_their_model_does(void) {
    if (!is_listed("amx")) SKIPm("this CPU, or its system, has no AMX");
    static const char *const sets[] = {"amx", "amx-model", "scalar"};
    for (int64_t tokens = 4; tokens <= 301; tokens += tokens < 40 ? 4 : 87) {
        backward_case l = tiled_lesson(tokens);
        results r[3];
        for (int i = 0; i < 3; i++) {
            engine e = trainer_new(&l.m, sets[i], NULL);
            gradient_set g = gradient_set_new(&l.config, DSV4_F32, tokens);
            r[i] = results_new(&l.config, DSV4_F32, tokens, l.entries);
            memset(r[i].stage[STAGE_KV], 0, r[i].bytes[STAGE_KV]);
            memset(r[i].stage[STAGE_GATE], 0, r[i].bytes[STAGE_GATE]);
            ASSERT_EQ(DSV4_OK, compress_whole(&e, &l.s, &r[i], NULL));
            ASSERT_EQ(DSV4_OK, backward_whole(&l, &e, &g));
            ASSERT_EQ_FMT((int)STAGE_COUNT, results_difference(&r[0], &r[i]), "%d");
            ASSERT_EQ_FMT((int)GRADIENTS, gradient_difference(&l.whole, &g, ORACLE_DX), "%d");
            gradient_set_free(&g);
            engine_free(&e);
        }
        for (int i = 0; i < 3; i++) results_free(&r[i]);
        backward_case_free(&l);
    }
    PASS();
}

/* ---- What the order is not --------------------------------------------------------------------------------- */

/* An fp32 operand is multiplied the same way whatever the order: dx and sums over tokens too. */
TEST fp32_operands_know_no_order(dsv4_dtype x, dsv4_dtype w) {
    dsv4_config c = {0};
    c.hidden_dim = 300;
    c.head_dim = 40;
    c.ratio = 3;
    backward_case l[2];
    results r[2];
    for (int i = 0; i < 2; i++) {
        c.sums = i ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
        l[i] = backward_case_new(model_of(&c, w, 51), sequence_new(&c, x, 299, 52), DSV4_F32, 53);
        r[i] = results_new(&c, DSV4_F32, 299, 99);
        memset(r[i].stage[STAGE_KV], 0, r[i].bytes[STAGE_KV]);
        memset(r[i].stage[STAGE_GATE], 0, r[i].bytes[STAGE_GATE]);
        ASSERT_EQ(DSV4_OK, compress_whole(&l[i].e, &l[i].s, &r[i], NULL));
    }
    const int same = results_difference(&r[0], &r[1]) == STAGE_COUNT &&
                     gradient_difference(&l[0].whole, &l[1].whole, ORACLE_DX) == GRADIENTS;
    ASSERT_EQ(x == DSV4_F32 || w == DSV4_F32, same);
    for (int i = 0; i < 2; i++) {
        results_free(&r[i]);
        backward_case_free(&l[i]);
    }
    PASS();
}

SUITE(sums) {
    static const struct {
        const char *name;
        dsv4_sums sums;
    } orders[] = {{"pairs", DSV4_SUMS_PAIRS}, {"tiles", DSV4_SUMS_TILES}};
    for (int i = 0; i < 2; i++) {
        greatest_set_test_suffix(orders[i].name);
        RUN_TESTp(projections_are_added_in_the_order_named, orders[i].sums);
        greatest_set_test_suffix(orders[i].name);
        RUN_TESTp(gradients_are_added_in_the_order_named, orders[i].sums);
        greatest_set_test_suffix(orders[i].name);
        RUN_TESTp(tiles_are_for_the_order_that_is_theirs, orders[i].sums);
    }
    RUN_TEST(cuts_at_multiples_of_32_give_the_same_sums_of_tiles);
    RUN_TEST(steps_are_counted_from_the_first_token);
    RUN_TEST(the_cpus_tiles_do_as_their_model_does);
    for (int x = DSV4_F32; x <= DSV4_BF16; x++)
        for (int w = DSV4_F32; w <= DSV4_BF16; w++) {
            greatest_set_test_suffix(x == w ? dtype_name((dsv4_dtype)x) : x == DSV4_F32 ? "f32_x" : "bf16_x");
            RUN_TESTp(fp32_operands_know_no_order, (dsv4_dtype)x, (dsv4_dtype)w);
        }
}

TESTS_MAIN(sums);
