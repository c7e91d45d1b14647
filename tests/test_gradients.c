/* The backward pass: right against PyTorch, central differences and the chain rule in double precision; the same bits
 * for any kernel set, thread count and cut; in order where numbers are extreme; refusing what makes no sense. */

#define _POSIX_C_SOURCE 200809L

#include "runner.h"
#include "golden_file.h"
#include "gradient_support.h"
#include "threads.h"

/* Seven windows and a bit, or many hundred tokens. */
static workbench case_of(const shape *of) {
    return training_new(of, of->tokens ? of->tokens : 7 * of->config.ratio + of->config.ratio / 2, 51);
}

/* How near a gradient has to come, as a share of its tensor's largest magnitude. */
static const double near_enough = 5e-6;

/* What central differences in double are off by, where the loss is about 10 and the step 1/2048. */
static const double difference_error = 1e-10;

#define ASSERT_SAME_GRADIENTS(expected, got, first, what)                                \
    do {                                                                                 \
        int found = gradient_difference(expected, got, first);                           \
        ASSERTm(note("%s differs: %s", gradient_name(found), what), found == GRADIENTS); \
    } while (0)

/* From `first` on; expected: the oracle's. */
#define ASSERT_NEAR_GRADIENTS(expected, got, first)                                                       \
    for (int which = (first); which < GRADIENTS; which++) {                                               \
        const double far = gradient_stray(got, expected, which);                                          \
        ASSERTm(note("%s strays by %.3g of its largest", gradient_name(which), far), far <= near_enough); \
    }

/* ---- Right ------------------------------------------------------------------------------------------------- */

TEST agrees_with_pytorch(const char *file, const char *isa) {
    golden g = golden_open(file);
    engine e = workbench_trainer(&g.w, isa, NULL);
    gradient_set got = workbench_gradients(&g.w, DSV4_F32);
    dsv4_gradients to = gradients_into(&got, st_find(&g.file, "dout")->data, DSV4_F32);
    dsv4_batch b = backward_batch(&g.w, g.segments, g.rows);
    b.drop_tail = 0;
    ASSERT_EQ(DSV4_OK, dsv4_backward(e.compressor, &b, &to, e.workspace, NULL));
    for (int i = 0; i < GRADIENTS; i++) {
        const st_tensor *expected = st_find(&g.file, gradient_name(i));
        double largest = 0;
        ASSERT_EQ(expected->count, got.count[i]);
        for (int64_t k = 0; k < got.count[i]; k++) largest = fmax(largest, fabs(number(expected->data, DSV4_F32, k)));
        for (int64_t k = 0; k < got.count[i]; k++)
            ASSERT_IN_RANGE(number(expected->data, DSV4_F32, k), number(got.data[i], DSV4_F32, k),
                            near_enough * largest);
    }
    golden_close(&g);
    PASS();
}

/* A small compressor of random odd sizes. One matrix at least is fp32, so that dkv and dgate are not rounded. */
static workbench random_case(uint64_t seed) {
    dice d = {seed};
    dsv4_config c = {0};
    dsv4_dtype type[DSV4_PARAM_COUNT];
    static const int64_t ratios[] = {1, 2, 3, 4, 5, 7, 9, 11};
    static const float pads[] = {0, -0.5f, -3, -INFINITY};
    c.hidden_dim = 1 + dice_below(&d, 23);
    c.head_dim = 2 + dice_below(&d, 19);
    c.rope_dim = 2 * dice_below(&d, c.head_dim / 2 + 1);
    c.ratio = ratios[dice_below(&d, 8)];
    c.overlap = (int)dice_below(&d, 2);
    c.no_ape = dice_below(&d, 4) == 0;
    c.no_gate = c.ratio == 1 && !c.overlap && dice_below(&d, 2);
    c.pad_gate = pads[dice_below(&d, 4)];
    c.yarn_factor = dice_below(&d, 2) ? 16 : 0;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) type[i] = dice_below(&d, 2) ? DSV4_BF16 : DSV4_F32;
    type[DSV4_WKV] = DSV4_F32;
    const dsv4_dtype x = dice_below(&d, 2) ? DSV4_BF16 : DSV4_F32;
    const int64_t tokens = c.ratio * (2 + dice_below(&d, 4)) + dice_below(&d, c.ratio);
    sequence s = sequence_new(&c, x, tokens, seed + 1);
    s.position = dice_below(&d, 100000);
    c.sums = dice_below(&d, 2) ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
    return training_with(model_new(&c, type, seed + 2), s, dice_below(&d, 2) ? DSV4_BF16 : DSV4_F32, seed + 3);
}

/* The header's gradient against differences of the forward oracle, at some elements of every array. */
TEST agrees_with_central_differences(uint64_t seed) {
    enum { SAMPLES = 50 };
    workbench w = random_case(seed);
    oracle_task t = oracle_task_of(&w);
    for (int which = 0; which < GRADIENTS; which++) {
        const int64_t count = w.gradients.count[which], samples = count < SAMPLES ? count : SAMPLES;
        double largest = 0;
        for (int64_t i = 0; i < count; i++) largest = fmax(largest, fabs(number(w.gradients.data[which], DSV4_F32, i)));
        for (int64_t k = 0; k < samples; k++) {
            const int64_t i = k * count / samples;
            const double expected = oracle_difference(&t.config, &t.params, &t.call, which, i);
            ASSERT_IN_RANGE(expected, number(w.gradients.data[which], DSV4_F32, i),
                            near_enough * largest + difference_error);
        }
    }
    workbench_free(&w);
    PASS();
}

/* The chain rule in double is the derivative of the forward oracle: what the next test builds on. */
TEST the_oracle_agrees_with_itself(uint64_t seed) {
    workbench w = random_case(seed);
    oracle_task t = oracle_task_of(&w);
    oracle_stages s = oracle_stages_new(&t.config, t.call.tokens);
    oracle_forward(&t.config, &t.params, t.call.x, t.call.start, &s);
    oracle_gradients g = oracle_backward(&t.config, &t.params, &t.call, &s);
    for (int which = 0; which < GRADIENTS; which++) {
        const double largest = largest_of(g.value[which], g.count[which]);
        for (int64_t i = 0; i < g.count[which]; i += g.count[which] / 20 + 1) {
            const double expected = oracle_difference(&t.config, &t.params, &t.call, which, i);
            ASSERT_IN_RANGE(expected, g.value[which][i], 1e-8 * largest + difference_error);
        }
    }
    oracle_gradients_free(&g);
    oracle_stages_free(&s);
    workbench_free(&w);
    PASS();
}

/* Every element of every gradient, every rounding preset and mix of types: rounding counts as the identity. */
TEST agrees_with_the_chain_rule_in_double(const shape *of) {
    workbench w = case_of(of);
    oracle_gradients expected = oracle_gradients_of(&w);
    for (int which = 0; which < GRADIENTS; which++) ASSERT_EQ(expected.count[which], w.gradients.count[which]);
    ASSERT_NEAR_GRADIENTS(&expected, &w.gradients, ORACLE_DX);
    workbench_free(&w);
    PASS();
}

/* ---- The same bits ----------------------------------------------------------------------------------------- */

/* The workbench's gradients through a compressor made for the occasion; in one call, or in cuts. */
static gradient_set gradients_with(workbench *w, const char *isa, const schedule *t, const int64_t *cuts) {
    team c;
    dsv4_parallel parallel = schedule_parallel(t, &c);
    engine e = trainer_new(&w->m, isa, &parallel);
    gradient_set got = workbench_gradients(w, DSV4_F32);
    dsv4_status status = cuts ? backward_cut(w, &e, cuts, 3, &got) : backward_whole(w, &e, &got);
    if (status != DSV4_OK) memset(got.data[ORACLE_DX], POISON, got.bytes[ORACLE_DX]);
    engine_free(&e);
    return got;
}

TEST every_kernel_set_gives_the_same_gradients(const shape *of) {
    workbench w = case_of(of);
    const char *isa;
    for (int k = 0; (isa = dsv4_isa_name(k)) != NULL; k++) {
        if (of->tokens && (k + (of - long_shapes)) % 2) continue; /* every other set, the others with the next one */
        gradient_set got = gradients_with(&w, isa, &schedules[k % SCHEDULE_COUNT], NULL);
        ASSERT_SAME_GRADIENTS(&w.gradients, &got, ORACLE_DX, isa);
    }
    workbench_free(&w);
    PASS();
}

TEST every_parallel_for_gives_the_same_gradients(const shape *of) {
    workbench w = case_of(of);
    for (int t = 0; t < SCHEDULE_COUNT; t++) {
        gradient_set got = gradients_with(&w, NULL, &schedules[t], NULL);
        ASSERT_SAME_GRADIENTS(&w.gradients, &got, ORACLE_DX, schedules[t].name);
    }
    workbench_free(&w);
    PASS();
}

/* A sequence whose length the ratio divides: cut into parts, it has no tail to drop. */
static workbench even_case(const shape *of) { return training_new(of, shape_windows(of, 7) * of->config.ratio, 52); }

/* To the bit; and the sums of any cut are right. A long sequence meets one kernel set a cut. */
TEST every_cut_gives_the_same_dx(const shape *of) {
    enum { CUTS = 4 };
    static const int64_t cuts[CUTS][3] = {{1, 1, 1}, {5, 3, 2}, {230, 1, 97}, {300, 257, 3}};
    workbench w = even_case(of);
    oracle_gradients expected = oracle_gradients_of(&w);
    const char *isa;
    for (int k = of->tokens ? 1 : 0; k < CUTS; k++) {
        for (int set = 0; (isa = dsv4_isa_name(set)) != NULL; set++) {
            if (of->tokens ? set != k % 3 : (set + k) % 2) continue; /* each set with half the cuts */
            gradient_set got = gradients_with(&w, isa, &schedules[(k + set) % SCHEDULE_COUNT], cuts[k]);
            ASSERT_MEM_EQ(w.gradients.data[ORACLE_DX], got.data[ORACLE_DX], got.bytes[ORACLE_DX]);
            ASSERT_NEAR_GRADIENTS(&expected, &got, ORACLE_DWKV);
        }
    }
    workbench_free(&w);
    PASS();
}

TEST cuts_at_multiples_of_256_give_the_same_sums(const shape *of) {
    static const int64_t cuts[][3] = {{256, 256, 256}, {512, 256, 256}, {256, 512, 256}};
    workbench w = even_case(of);
    for (int k = 0; k < 3; k++) {
        gradient_set got = workbench_gradients(&w, DSV4_F32);
        ASSERT_EQ(DSV4_OK, backward_cut(&w, &w.e, cuts[k], 3, &got));
        ASSERT_SAME_GRADIENTS(&w.gradients, &got, ORACLE_DX, note("cut %d", k));
    }
    workbench_free(&w);
    PASS();
}

/* More tokens than are gathered before the weights' gradients are added to: as if each 256 had come alone. */
TEST thousands_of_tokens_give_the_sums_of_their_parts(int hidden_dim, int head_dim, dsv4_dtype dtype) {
    static const int64_t cut[] = {256, 256, 256, 256, 256, 256, 256, 256, 256, 256};
    const dsv4_config c = {.hidden_dim = hidden_dim, .head_dim = head_dim, .ratio = 4, .overlap = 1};
    workbench w = training_for(&c, dtype, dtype, 10 * 256 + 64, 83);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    ASSERT_EQ(DSV4_OK, backward_cut(&w, &w.e, cut, 10, &got));
    ASSERT_SAME_GRADIENTS(&w.gradients, &got, ORACLE_DX, "in parts");
    workbench_free(&w);
    PASS();
}

/* Blocks of 256 are counted from the sequence's first token, wherever a part begins: cutting one up at these changes
 * nothing. */
TEST blocks_are_counted_from_the_first_token(const shape *of) {
    static const int64_t once[] = {100, 100000}, often[] = {100, 156, 256, 256, 256, 256};
    workbench w = even_case(of);
    gradient_set a = workbench_gradients(&w, DSV4_F32), b = workbench_gradients(&w, DSV4_F32);
    ASSERT_EQ(DSV4_OK, backward_cut(&w, &w.e, once, 2, &a));
    ASSERT_EQ(DSV4_OK, backward_cut(&w, &w.e, often, 6, &b));
    ASSERT_SAME_GRADIENTS(&a, &b, ORACLE_DX, "cut once more");
    workbench_free(&w);
    PASS();
}

/* Projections that the forward pass wrote down, given beside x. */
TEST kept_projections_give_the_bits_of_recomputing(const shape *of) {
    workbench w = case_of(of);
    results r = workbench_results_in(&w, DSV4_F32);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    dsv4_batch b = backward_whole_batch(&w);
    dsv4_gradients to = gradients_into(&got, w.dout, w.out_dtype);
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, NULL));
    b.kv = r.stage[STAGE_KV];
    b.gate = w.config.no_gate ? NULL : r.stage[STAGE_GATE];
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    ASSERT_SAME_GRADIENTS(&w.gradients, &got, ORACLE_DX, "kept");
    workbench_free(&w);
    PASS();
}

/* The first gradient by which one call of all documents differs from a call of each, accumulated in order; -1 where a
 * call fails. */
static int packed_difference(workbench *w, const dsv4_segment *documents, int count) {
    gradient_set together = workbench_gradients(w, DSV4_F32), apart = workbench_gradients(w, DSV4_F32);
    dsv4_gradients to = gradients_into(&together, w->dout, w->out_dtype);
    dsv4_batch b = backward_batch(w, documents, count);
    int failed = workbench_backward(w, &b, &to) != DSV4_OK;
    to = gradients_into(&apart, w->dout, w->out_dtype);
    for (int k = 0; k < count; k++) {
        b = backward_batch(w, &documents[k], 1);
        to.accumulate = k > 0;
        failed |= workbench_backward(w, &b, &to) != DSV4_OK;
    }
    return failed ? -1 : gradient_difference(&together, &apart, ORACLE_DX);
}

/* Documents of odd lengths side by side. */
TEST packed_documents_are_separate_calls_in_order(const shape *of) {
    enum { COUNT = 5 };
    static const int share[COUNT + 1] = {0, 13, 14, 55, 81, 97}; /* of 97 parts; in the order below */
    static const int order[COUNT] = {2, 0, 4, 1, 3};
    workbench w = case_of(of);
    dsv4_segment documents[COUNT];
    int64_t entry = 0;
    for (int k = 0; k < COUNT; k++) {
        const int64_t from = w.s.tokens * share[order[k]] / 97, to = w.s.tokens * share[order[k] + 1] / 97;
        documents[k] = segment_new(from, to - from, 17 * k, entry, NULL);
        entry += (to - from) / w.config.ratio;
    }
    ASSERT_EQ_FMT((int)GRADIENTS, packed_difference(&w, documents, COUNT), "%d");
    workbench_free(&w);
    PASS();
}

/* Nothing is rounded to bf16 where one matrix is fp32, be it the gate's alone. */
TEST a_wide_gate_beside_a_narrow_wkv_agrees_with_the_chain_rule(void) {
    static const dsv4_dtype types[DSV4_PARAM_COUNT] = {DSV4_BF16, DSV4_F32, DSV4_F32, DSV4_F32};
    const dsv4_config c = {.hidden_dim = 21, .head_dim = 18, .ratio = 4, .overlap = 1};
    workbench w = training_with(model_new(&c, types, 71), sequence_new(&c, DSV4_BF16, 20, 72), DSV4_F32, 73);
    oracle_gradients expected = oracle_gradients_of(&w);
    ASSERT_NEAR_GRADIENTS(&expected, &w.gradients, ORACLE_DX);
    workbench_free(&w);
    PASS();
}

/* A whole sequence, of which no gradient is carried, beside a part of another one. */
TEST whole_sequences_and_parts_share_a_call(void) {
    workbench w = training_new(&shapes[1], 20, 74); /* ratio 4 */
    const int64_t lengths[] = {8, 12};
    backward_parts p = backward_parts_of(&w, &w.e, lengths, 2);
    gradient_set together = workbench_gradients(&w, DSV4_F32), apart = workbench_gradients(&w, DSV4_F32);
    const dsv4_segment segments[2] = {segment_new(0, 8, 0, 0, NULL),
                                      segment_new(8, 12, w.s.position + 8, 2, p.state[1])};
    const dsv4_segment_gradient carried[2] = {{NULL, NULL}, {NULL, p.gradient[1]}};
    dsv4_gradients to = gradients_into(&together, w.dout, w.out_dtype);
    dsv4_batch b = backward_batch(&w, segments, 2);
    to.segments = carried;
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    to = gradients_into(&apart, w.dout, w.out_dtype);
    for (int k = 0; k < 2; k++) {
        b = backward_batch(&w, &segments[k], 1);
        to.segments = &carried[k];
        to.accumulate = k;
        ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    }
    ASSERT_SAME_GRADIENTS(&together, &apart, ORACLE_DX, "together");
    backward_parts_free(&p);
    workbench_free(&w);
    PASS();
}

/* Two documents of which the first one ends anywhere in what is recomputed at a time. */
TEST a_document_may_end_anywhere_in_a_chunk(void) {
    const dsv4_config c = {.hidden_dim = 5, .head_dim = 4, .ratio = 1, .overlap = 1};
    workbench w = training_for(&c, DSV4_F32, DSV4_F32, 256, 63);
    for (int64_t first = 200; first < 256; first++) {
        const dsv4_segment documents[2] = {segment_new(0, first, 0, 0, NULL),
                                           segment_new(first, 256 - first, 0, first, NULL)};
        ASSERTm(note("%d and %d tokens", (int)first, (int)(256 - first)),
                packed_difference(&w, documents, 2) == GRADIENTS);
    }
    workbench_free(&w);
    PASS();
}

TEST hundreds_of_short_documents_are_separate_calls_in_order(void) {
    enum { COUNT = 300 };
    workbench w = training_new(&shapes[10], 2 * COUNT, 66); /* ratio 2 */
    dsv4_segment documents[COUNT];
    for (int k = 0; k < COUNT; k++) documents[k] = segment_new(2 * k, 2, 7 * k, k, NULL);
    ASSERT_EQ_FMT((int)GRADIENTS, packed_difference(&w, documents, COUNT), "%d");
    workbench_free(&w);
    PASS();
}

/* Parts in one call whose context outgrows a chunk in each way there is: many parts, many windows, many rows. `count`
 * parts of a sequence that has come to 255 tokens, the first ones of `length` tokens, the others of one. */
static const struct carried_case {
    const char *name;
    int64_t ratio, longer, length, count;
} carried_cases[] = {{"parts", 32, 0, 0, 70}, {"windows", 32, 17, 33, 70}, {"rows", 64, 20, 65, 20}};

TEST what_many_parts_carry_is_what_each_carries_alone(const struct carried_case *of) {
    enum { MOST = 70, SEEN = 255 };
    const dsv4_config c = {.hidden_dim = 5, .head_dim = 4, .ratio = of->ratio, .overlap = 1};
    workbench w = training_for(&c, DSV4_F32, DSV4_F32, 1500, 67);
    w.entries = w.s.tokens / 8; /* more than the sequence alone would give */
    w.dout = keep(&w, random_array(DSV4_F32, w.entries * c.head_dim, 70, 1));
    const int64_t lengths[] = {SEEN, w.s.tokens};
    backward_parts p = backward_parts_of(&w, &w.e, lengths, 2);
    dsv4_segment segments[MOST];
    dsv4_segment_gradient carried[MOST];
    int64_t token = 0, entry = 0;
    for (int k = 0; k < of->count; k++) {
        dsv4_state *state = workbench_state(&w, 0);
        ASSERT_EQ(DSV4_OK, dsv4_state_copy(state, p.state[1], NULL));
        segments[k] = segment_new(token, k < of->longer ? of->length : 1, SEEN, entry, state);
        carried[k] = (dsv4_segment_gradient){NULL, workbench_state(&w, 0)};
        token += segments[k].count;
        entry += dsv4_entry_count(&c, state, segments[k].count);
    }
    ASSERT(token <= w.s.tokens && entry <= w.entries);
    dsv4_gradients to = {.dout = {w.dout, w.out_dtype, 0}, .segments = carried};
    dsv4_batch b = backward_batch(&w, segments, of->count);
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    for (int k = 0; k < of->count; k++) {
        const saved together = workbench_saved(&w, carried[k].previous);
        b = backward_batch(&w, &segments[k], 1);
        to.segments = &carried[k];
        ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
        ASSERT(is_still(carried[k].previous, &together));
    }
    backward_parts_free(&p);
    workbench_free(&w);
    PASS();
}

/* ---- Where gradients go ------------------------------------------------------------------------------------ */

/* Rows further apart than they are wide, and arrays that are not wanted, change no number and touch nothing else. */
TEST each_gradient_is_optional_and_strides_do_not_matter(const shape *of) {
    workbench w = training_new(of, 5 * of->config.ratio, 53);
    dsv4_batch b = backward_whole_batch(&w);
    const int64_t dx_stride = w.config.hidden_dim + 5, dout_stride = w.config.head_dim + 3;
    const size_t row = (size_t)w.config.hidden_dim * 4, number_size = dsv4_dtype_size(w.out_dtype);
    char *dout = workbench_memory(&w, (size_t)(dout_stride * w.entries) * number_size);
    memset(dout, 0xFF, (size_t)(dout_stride * w.entries) * number_size);
    for (int64_t e = 0; e < w.entries; e++)
        memcpy(dout + (size_t)(e * dout_stride) * number_size,
               (char *)w.dout + (size_t)(e * w.config.head_dim) * number_size, (size_t)w.config.head_dim * number_size);
    for (int wanted = 0; wanted < GRADIENTS; wanted++) {
        gradient_set got = keep_gradients(&w, gradient_set_new(&w.config, DSV4_F32, w.s.tokens * dx_stride));
        gradient_set masked = got;
        for (int i = 0; i < GRADIENTS; i++) masked.data[i] = i == wanted ? got.data[i] : NULL;
        dsv4_gradients to = gradients_into(&masked, dout, w.out_dtype);
        to.dx.stride = dx_stride;
        to.dout.stride = dout_stride;
        ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
        for (int i = ORACLE_DWKV; i < GRADIENTS; i++) {
            if (i == wanted && got.count[i])
                ASSERT_MEM_EQ(w.gradients.data[i], got.data[i], got.bytes[i]);
            else
                ASSERT(memory_untouched(got.data[i], got.bytes[i]));
        }
        for (int64_t t = 0; t < w.s.tokens; t++) {
            const char *at = (char *)got.data[ORACLE_DX] + (size_t)(t * dx_stride) * 4;
            if (wanted == ORACLE_DX) ASSERT_MEM_EQ((char *)w.gradients.data[ORACLE_DX] + (size_t)t * row, at, row);
            ASSERT(memory_untouched(wanted == ORACLE_DX ? at + row : at, 5 * 4));
        }
    }
    workbench_free(&w);
    PASS();
}

/* Rows of `width` bytes, without gaps, as rows `stride` bytes apart, the gaps poisoned; nothing after the last row. */
static void *spread(workbench *w, const void *rows, int64_t count, int64_t width, int64_t stride) {
    unsigned char *apart = workbench_memory(w, (size_t)((count - 1) * stride + width));
    memset(apart, POISON, (size_t)((count - 1) * stride + width));
    for (int64_t i = 0; i < count; i++)
        memcpy(apart + i * stride, (const unsigned char *)rows + i * width, (size_t)width);
    return apart;
}

static int is_spread(const void *apart, const void *rows, int64_t count, int64_t width, int64_t stride) {
    const unsigned char *row = apart;
    for (int64_t i = 0; i < count; i++, row += stride) {
        if (memcmp(row, (const unsigned char *)rows + i * width, (size_t)width) != 0) return 0;
        if (i + 1 < count && !memory_untouched(row + width, (size_t)(stride - width))) return 0;
    }
    return 1;
}

/* The workbench's compressor from parameters whose rows lie apart. */
static engine spread_trainer(workbench *w) {
    model m = w->m;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        dsv4_const_matrix *param = model_array(&m.params, i);
        const int64_t number_size = (int64_t)dsv4_dtype_size(param->dtype), width = m.info[i].columns;
        if (m.info[i].count == 0) continue;
        param->stride = width + 3 + i;
        param->data = spread(w, w->m.data[i], m.info[i].rows, width * number_size, param->stride * number_size);
    }
    return keep_engine(w, trainer_new(&m, NULL, NULL));
}

/* Small whole numbers, from the gradient `first` on. */
static void fill(const gradient_set *g, int first) {
    for (int i = first; i < GRADIENTS; i++)
        for (int64_t k = 0; k < g->count[i]; k++) set_number(g->data[i], g->dtype, k, (float)(k % 7) - 3);
}

/* Forward and backward, sums from anew and on; what lies between the rows is neither read nor written. */
TEST parameters_and_their_gradients_may_have_strides(const shape *of, dsv4_dtype dtype, int accumulate) {
    workbench w = training_new(of, 5 * of->config.ratio, 57);
    engine e = spread_trainer(&w);
    results dense = workbench_results(&w), r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &dense, NULL));
    ASSERT_EQ(DSV4_OK, compress_whole(&e, &w.s, &r, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&dense, &r));

    gradient_set g = workbench_gradients(&w, dtype);
    void *dx = workbench_memory(&w, g.bytes[ORACLE_DX]);
    fill(&g, ORACLE_DX);
    dsv4_gradients to = gradients_into(&g, w.dout, w.out_dtype), apart = to;
    const int64_t number_size = (int64_t)dsv4_dtype_size(dtype);
    apart.dx.data = dx;
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        const dsv4_param_info *info = &w.m.info[i];
        dsv4_matrix *target = gradient_target(&apart, ORACLE_DWKV + i);
        if (info->count == 0) continue;
        target->stride = info->columns + 5 - i;
        target->data = spread(&w, target->data, info->rows, info->columns * number_size, target->stride * number_size);
    }
    const dsv4_batch b = backward_batch(&w, NULL, 0);
    to.accumulate = apart.accumulate = accumulate;
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    ASSERT_EQ(DSV4_OK, dsv4_backward(e.compressor, &b, &apart, e.workspace, NULL));
    ASSERT_MEM_EQ(g.data[ORACLE_DX], dx, g.bytes[ORACLE_DX]);
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        const dsv4_param_info *info = &w.m.info[i];
        const dsv4_matrix *target = gradient_target(&apart, ORACLE_DWKV + i);
        if (info->count == 0) continue;
        ASSERTm(info->name, is_spread(target->data, g.data[ORACLE_DWKV + i], info->rows, info->columns * number_size,
                                      target->stride * number_size));
    }
    workbench_free(&w);
    PASS();
}

/* The easy call, with a tail that is dropped. */
TEST no_segments_are_one_whole_sequence(const shape *of) {
    workbench w = training_new(of, 6 * of->config.ratio - 1, 58);
    gradient_set explicit = workbench_gradients(&w, DSV4_F32), easy = workbench_gradients(&w, DSV4_F32);
    w.s.position = 0;
    ASSERT_EQ(DSV4_OK, backward_whole(&w, &w.e, &explicit));
    dsv4_batch b = backward_batch(&w, NULL, 0);
    const dsv4_gradients to = gradients_into(&easy, w.dout, w.out_dtype);
    b.drop_tail = 0;
    if (of->config.ratio > 1) ASSERT_EQ(DSV4_ERROR_LENGTH, workbench_backward(&w, &b, &to));
    if (of->config.ratio > 1) ASSERT(gradients_untouched(&easy));
    b.drop_tail = 1;
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    ASSERT_SAME_GRADIENTS(&explicit, &easy, 0, "without segments");
    workbench_free(&w);
    PASS();
}

/* Accumulating begins with what the arrays hold: on zeros it overwrites, on the first half it gives the whole. */
TEST accumulating_goes_on_from_what_the_arrays_hold(const shape *of) {
    workbench w = training_new(of, 4 * of->config.ratio, 54);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    dsv4_batch b = backward_whole_batch(&w);
    dsv4_gradients to = gradients_into(&got, w.dout, w.out_dtype);
    to.accumulate = 1;
    fill(&got, ORACLE_DWKV);
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    for (int i = ORACLE_DWKV; i < GRADIENTS; i++)
        for (int64_t k = 0; k < got.count[i]; k++) {
            /* one block: what was there, plus the block's sum */
            const float expected = (float)(k % 7) - 3 + (float)number(w.gradients.data[i], DSV4_F32, k);
            ASSERT_EQ_FMT((double)expected, number(got.data[i], DSV4_F32, k), "%.9g");
        }
    ASSERT_MEM_EQ(w.gradients.data[ORACLE_DX], got.data[ORACLE_DX], got.bytes[ORACLE_DX]);
    workbench_free(&w);
    PASS();
}

/* Sums are made in fp32 and rounded once, at the end of a call. */
TEST bf16_gradients_are_the_rounded_fp32_ones(const shape *of) {
    workbench w = case_of(of);
    gradient_set got = workbench_gradients(&w, DSV4_BF16);
    ASSERT_EQ(DSV4_OK, backward_whole(&w, &w.e, &got));
    for (int which = 0; which < GRADIENTS; which++)
        for (int64_t k = 0; k < got.count[which]; k++)
            ASSERT_EQ(dsv4_bf16_from_f32(((float *)w.gradients.data[which])[k]), ((dsv4_bf16 *)got.data[which])[k]);
    workbench_free(&w);
    PASS();
}

TEST bf16_gradients_accumulate_too(const shape *of) {
    workbench w = case_of(of);
    gradient_set got = workbench_gradients(&w, DSV4_BF16), wide = workbench_gradients(&w, DSV4_F32);
    dsv4_batch b = backward_whole_batch(&w);
    fill(&got, ORACLE_DWKV);
    fill(&wide, ORACLE_DWKV);
    for (int narrow = 0; narrow < 2; narrow++) {
        dsv4_gradients to = gradients_into(narrow ? &got : &wide, w.dout, w.out_dtype);
        to.accumulate = 1;
        ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    }
    for (int which = ORACLE_DWKV; which < GRADIENTS; which++)
        for (int64_t k = 0; k < got.count[which]; k++)
            ASSERT_EQ(dsv4_bf16_from_f32(((float *)wide.data[which])[k]), ((dsv4_bf16 *)got.data[which])[k]);
    workbench_free(&w);
    PASS();
}

/* What is carried to the part before comes out the same alone as beside everything else. */
TEST the_carried_gradient_can_be_had_alone(const shape *of) {
    workbench w = even_case(of);
    const int64_t lengths[] = {w.s.tokens * 3 / 7, w.s.tokens};
    backward_parts p = backward_parts_of(&w, &w.e, lengths, 2);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    dsv4_gradients everything = gradients_into(&got, w.dout, w.out_dtype);
    const dsv4_gradients nothing = {.dout = everything.dout};
    saved carried[2];
    for (int alone = 0; alone < 2; alone++) {
        ASSERT_EQ(DSV4_OK, backward_part(&w, &w.e, &p, 1, alone ? nothing : everything, p.gradient[1]));
        ASSERT_EQ(dsv4_state_tokens(p.state[1]), dsv4_state_tokens(p.gradient[1]));
        carried[alone] = workbench_saved(&w, p.gradient[1]);
    }
    ASSERT(same_bytes(&carried[0], &carried[1]));
    backward_parts_free(&p);
    workbench_free(&w);
    PASS();
}

/* A training compressor gives the entries of one that is not, and the backward pass advances no state. */
TEST training_changes_no_entry_and_advances_no_state(const shape *of) {
    workbench plain = workbench_new(of, 6, 55), w = training_new(of, 6 * of->config.ratio, 55);
    results r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&plain.whole, &r));
    const int64_t lengths[] = {2 * of->config.ratio + of->config.ratio / 2, w.s.tokens};
    backward_parts p = backward_parts_of(&w, &w.e, lengths, 2);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    ASSERT_EQ(2, p.count);
    const saved before = workbench_saved(&w, p.state[1]);
    ASSERT_EQ(DSV4_OK, backward_part(&w, &w.e, &p, 1, gradients_into(&got, w.dout, w.out_dtype), p.gradient[1]));
    ASSERT(is_still(p.state[1], &before));
    backward_parts_free(&p);
    workbench_free(&plain);
    workbench_free(&w);
    PASS();
}

/* ---- Extremes ---------------------------------------------------------------------------------------------- */

static int all_zero(const gradient_set *g, int which, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++)
        if (number(g->data[which], g->dtype, i) != 0) return 0;
    return 1;
}

static int is_zero(const gradient_set *g, int which) { return all_zero(g, which, 0, g->count[which]); }

static int all_finite(const gradient_set *g) {
    for (int which = 0; which < GRADIENTS; which++)
        for (int64_t i = 0; i < g->count[which]; i++)
            if (!isfinite(number(g->data[which], g->dtype, i))) return 0;
    return 1;
}

static dsv4_config small_csa(void) {
    return (dsv4_config){.hidden_dim = 21, .head_dim = 18, .ratio = 4, .rope_dim = 6, .overlap = 1};
}

static workbench small_case(const dsv4_config *c, int64_t tokens) {
    return training_for(c, DSV4_F32, DSV4_F32, tokens, 56);
}

/* A sequence of one window looks back at the pad alone: the first series, which nothing else uses, gets exactly
 * nothing. */
TEST the_pad_sends_no_gradient(float pad_gate) {
    dsv4_config c = small_csa();
    c.pad_gate = pad_gate;
    workbench w = small_case(&c, c.ratio);
    const int64_t first = c.head_dim, width = c.hidden_dim;
    ASSERT(all_zero(&w.gradients, ORACLE_DWKV, 0, first * width));
    ASSERT(all_zero(&w.gradients, ORACLE_DWGATE, 0, first * width));
    for (int64_t row = 0; row < c.ratio; row++)
        ASSERT(all_zero(&w.gradients, ORACLE_DAPE, row * 2 * first, row * 2 * first + first));
    ASSERT_FALSE(all_zero(&w.gradients, ORACLE_DWKV, first * width, w.gradients.count[ORACLE_DWKV]));
    ASSERT_FALSE(is_zero(&w.gradients, ORACLE_DX));
    workbench_free(&w);
    PASS();
}

/* And its own rows get what they would get without any pad: the same bits for every pad that weighs nothing. */
TEST a_pad_that_weighs_nothing_may_be_any(void) {
    static const float pads[] = {-1e4f, -2e5f, -INFINITY};
    dsv4_config c = small_csa();
    workbench usual = small_case(&c, 3 * c.ratio);
    for (int i = 0; i < 3; i++) {
        c.pad_gate = pads[i];
        workbench w = small_case(&c, 3 * c.ratio);
        ASSERT_SAME_GRADIENTS(&usual.gradients, &w.gradients, ORACLE_DX, note("pad %g", (double)pads[i]));
        workbench_free(&w);
    }
    workbench_free(&usual);
    PASS();
}

/* A small one whose gate, ape and tokens were multiplied. */
static workbench scaled_case(const dsv4_config *c, float gate, float ape, float x) {
    model m = model_of(c, DSV4_F32, 59);
    sequence s = sequence_new(c, DSV4_F32, 5 * c->ratio, 60);
    float *const arrays[3] = {m.data[DSV4_WGATE], m.data[DSV4_APE], s.x};
    const int64_t counts[3] = {m.info[DSV4_WGATE].count, m.info[DSV4_APE].count, s.tokens * c->hidden_dim};
    const float scales[3] = {gate, ape, x};
    for (int a = 0; a < 3; a++)
        for (int64_t i = 0; i < counts[a]; i++) arrays[a][i] *= scales[a];
    return training_with(m, s, DSV4_F32, 61);
}

TEST saturated_gates_give_finite_gradients(float scale) {
    dsv4_config c = small_csa();
    workbench w = scaled_case(&c, scale, 1, 1);
    oracle_gradients expected = oracle_gradients_of(&w);
    ASSERT(all_finite(&w.gradients));
    ASSERT(gradient_stray(&w.gradients, &expected, ORACLE_DWKV) <= near_enough);
    ASSERT(gradient_stray(&w.gradients, &expected, ORACLE_DNORM) <= near_enough);
    workbench_free(&w);
    PASS();
}

/* Gates so far apart that one row is all of a window: nothing is left to choose, so the gate gets exactly nothing. */
TEST a_gate_that_has_chosen_gets_no_gradient(void) {
    dsv4_config c = small_csa();
    c.overlap = 0;
    workbench w = scaled_case(&c, 1e9f, 1, 1);
    ASSERT(all_finite(&w.gradients));
    ASSERT(is_zero(&w.gradients, ORACLE_DWGATE));
    ASSERT(is_zero(&w.gradients, ORACLE_DAPE));
    ASSERT_FALSE(is_zero(&w.gradients, ORACLE_DWKV));
    workbench_free(&w);
    PASS();
}

TEST windows_of_equal_scores_give_finite_gradients(void) {
    dsv4_config c = small_csa();
    workbench w = scaled_case(&c, 0, 0, 1);
    oracle_gradients expected = oracle_gradients_of(&w);
    ASSERT(all_finite(&w.gradients));
    ASSERT_NEAR_GRADIENTS(&expected, &w.gradients, ORACLE_DX);
    workbench_free(&w);
    PASS();
}

/* Nothing but zeros: pooled rows are 0, and RMSNorm divides by sqrt(eps), even by V4.1's. */
TEST zeros_give_finite_gradients(float eps) {
    dsv4_config c = small_csa();
    c.eps = eps;
    workbench w = scaled_case(&c, 1, 1, 0);
    ASSERT(all_finite(&w.gradients));
    ASSERT(is_zero(&w.gradients, ORACLE_DWKV));
    ASSERT(is_zero(&w.gradients, ORACLE_DNORM));
    ASSERT_FALSE(is_zero(&w.gradients, ORACLE_DX));
    workbench_free(&w);
    PASS();
}

/* The dropped tail had no part in any entry: its dx is 0, and everything else as if it had never been. */
TEST the_dropped_tail_gets_no_gradient(const shape *of) {
    const int64_t tail = of->config.ratio - 1, tokens = 5 * of->config.ratio;
    workbench w = training_new(of, tokens + tail, 62);
    const int64_t width = w.config.hidden_dim;
    ASSERT(all_zero(&w.gradients, ORACLE_DX, tokens * width, (tokens + tail) * width));
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    dsv4_segment whole = segment_new(0, tokens, w.s.position, 0, NULL);
    dsv4_batch b = backward_batch(&w, &whole, 1);
    dsv4_gradients to = gradients_into(&got, w.dout, w.out_dtype);
    b.drop_tail = 0;
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    ASSERT_SAME_GRADIENTS(&w.gradients, &got, ORACLE_DWKV, "without the tail");
    ASSERT_MEM_EQ(w.gradients.data[ORACLE_DX], got.data[ORACLE_DX], (size_t)(tokens * width) * 4);
    ASSERT(memory_untouched((char *)got.data[ORACLE_DX] + (tokens * width) * 4, (size_t)(tail * width) * 4));
    workbench_free(&w);
    PASS();
}

/* No window at all: sums that start anew are 0, others stay. */
TEST a_call_without_windows_gives_zeros(void) {
    dsv4_config c = small_csa();
    workbench w = small_case(&c, c.ratio - 1);
    for (int which = 0; which < GRADIENTS; which++) ASSERT(is_zero(&w.gradients, which));
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    dsv4_batch b = backward_batch(&w, NULL, 0);
    dsv4_gradients to = gradients_into(&got, w.dout, w.out_dtype);
    b.tokens = 0;
    to.accumulate = 1;
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    ASSERT(gradients_untouched(&got));
    workbench_free(&w);
    PASS();
}

TEST a_call_without_tokens_gives_zeros(void) {
    dsv4_config c = small_csa();
    workbench w = small_case(&c, c.ratio);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    dsv4_batch b = {0};
    dsv4_gradients to = gradients_into(&got, NULL, DSV4_F32);
    to.dx.data = NULL;
    ASSERT_EQ(DSV4_OK, workbench_backward(&w, &b, &to));
    for (int which = ORACLE_DWKV; which < GRADIENTS; which++) ASSERT(is_zero(&got, which));
    workbench_free(&w);
    PASS();
}

/* ---- Memory ------------------------------------------------------------------------------------------------ */

/* One workspace of the size announced serves any length and allocates nothing. */
TEST the_workspace_does_not_grow_with_the_sequence(const shape *of) {
    workbench w = case_of(of);
    ledger book = {0};
    dsv4_allocator allocator = ledger_allocator(&book);
    dsv4_options options = {NULL, 1, 0};
    engine e = {0};
    size_t compressor_bytes = 0, workspace_bytes = 0, plain_bytes = 0;
    ASSERT_EQ(DSV4_OK, dsv4_compressor_size(&w.config, &w.m.params, &options, &compressor_bytes, NULL));
    ASSERT_EQ(DSV4_OK, dsv4_compressor_create(&w.config, &w.m.params, &options, &allocator, &e.compressor, NULL));
    ASSERT_EQ(compressor_bytes, book.last_size);
    ASSERT_EQ(DSV4_OK, dsv4_workspace_size(e.compressor, 1, &workspace_bytes, NULL));
    ASSERT_EQ(DSV4_OK, dsv4_workspace_create(e.compressor, NULL, &allocator, &e.workspace, NULL));
    ASSERT_EQ(workspace_bytes, book.last_size);
    ASSERT_EQ(2, book.calls);
    engine plain = workbench_engine(&w, NULL, NULL);
    ASSERT_EQ(DSV4_OK, dsv4_workspace_size(plain.compressor, 1, &plain_bytes, NULL));
    ASSERT(plain_bytes < workspace_bytes);
    for (int64_t tokens = 0; tokens <= w.s.tokens; tokens += 225) {
        gradient_set got = workbench_gradients(&w, DSV4_F32);
        dsv4_segment part = segment_new(0, tokens, 0, 0, NULL);
        dsv4_batch b = backward_batch(&w, &part, 1);
        dsv4_gradients to = gradients_into(&got, w.dout, w.out_dtype);
        ASSERT_EQ(DSV4_OK, dsv4_backward(e.compressor, &b, &to, e.workspace, NULL));
    }
    ASSERT_EQ(2, book.calls);
    engine_free(&e);
    ASSERT_EQ(0, book.live);
    workbench_free(&w);
    PASS();
}

/* ---- Refused ----------------------------------------------------------------------------------------------- */

/* A call that is right, to be made wrong in one place. */
typedef struct bad_backward_parts {
    engine e;
    dsv4_batch batch;
    dsv4_gradients to;
    dsv4_segment segments[2];
    dsv4_segment_gradient carried[2];
    dsv4_state *other; /* of another configuration */
    dsv4_state *fresh; /* of this one, no token seen */
    engine untrained;
} bad_backward_parts;

#define BAD_BACKWARD_CALLS(X)                                                                                   \
    X(no_training, p->e = p->untrained, DSV4_ERROR_ARGUMENT)                                                    \
    X(no_compressor, p->e.compressor = NULL, DSV4_ERROR_NULL)                                                   \
    X(no_workspace, p->e.workspace = NULL, DSV4_ERROR_NULL)                                                     \
    X(foreign_workspace, p->e.workspace = p->untrained.workspace, DSV4_ERROR_ARGUMENT)                          \
    X(no_dout, p->to.dout.data = NULL, DSV4_ERROR_NULL)                                                         \
    X(no_x, p->batch.x.data = NULL, DSV4_ERROR_NULL)                                                            \
    X(odd_dout, p->to.dout.data = (const char *)p->to.dout.data + 1, DSV4_ERROR_ALIGNMENT)                      \
    X(odd_dx, p->to.dx.data = (char *)p->to.dx.data + 1, DSV4_ERROR_ALIGNMENT)                                  \
    X(odd_dnorm, p->to.dnorm.data = (char *)p->to.dnorm.data + 2, DSV4_ERROR_ALIGNMENT)                         \
    X(strange_type, p->to.dape.dtype = (dsv4_dtype)7, DSV4_ERROR_ARGUMENT)                                      \
    X(strange_dout_type, p->to.dout.dtype = (dsv4_dtype)-1, DSV4_ERROR_ARGUMENT)                                \
    X(forgotten_segment_count, p->batch.segment_count = 0, DSV4_ERROR_ARGUMENT)                                 \
    X(narrow_dwkv, p->to.dwkv.dtype = DSV4_BF16, DSV4_ERROR_ARGUMENT)                                           \
    X(narrow_dwgate, p->to.dwgate.dtype = DSV4_BF16, DSV4_ERROR_ARGUMENT)                                       \
    X(short_dx_stride, p->to.dx.stride = 20, DSV4_ERROR_ARGUMENT)                                               \
    X(short_dout_stride, p->to.dout.stride = -1, DSV4_ERROR_ARGUMENT)                                           \
    X(short_x_stride, p->batch.x.stride = 1, DSV4_ERROR_ARGUMENT)                                               \
    X(vast_dx_stride, p->to.dx.stride = INT64_MAX / 2, DSV4_ERROR_OVERFLOW)                                     \
    X(negative_entries, p->batch.entries = -1, DSV4_ERROR_ARGUMENT)                                             \
    X(few_entries, p->batch.entries = 1, DSV4_ERROR_BOUNDS)                                                     \
    X(beyond_x, p->segments[1].token += 1, DSV4_ERROR_BOUNDS)                                                   \
    X(no_segments, p->batch.segments = NULL, DSV4_ERROR_NULL)                                                   \
    X(odd_length, (p->segments[0].state = NULL, p->carried[0].next = p->carried[0].previous = NULL),            \
      DSV4_ERROR_LENGTH)                                                                                        \
    X(wrong_position, p->segments[1].position += 1, DSV4_ERROR_STATE)                                           \
    X(same_state_twice, p->segments[0].state = p->segments[1].state, DSV4_ERROR_STATE)                          \
    X(next_without_state, p->segments[0] = segment_new(0, 4, 0, 0, NULL), DSV4_ERROR_STATE)                     \
    X(next_elsewhere, p->carried[1].next = p->fresh, DSV4_ERROR_STATE)                                          \
    X(next_of_another, p->carried[0].next = p->other, DSV4_ERROR_STATE)                                         \
    X(previous_of_another, p->carried[1].previous = p->other, DSV4_ERROR_STATE)                                 \
    X(previous_is_the_state, p->carried[1].previous = p->segments[1].state, DSV4_ERROR_STATE)                   \
    X(next_is_the_state, p->carried[0].next = p->segments[0].state, DSV4_ERROR_STATE)                           \
    X(kept_projections_without_x, (p->batch.kv = p->batch.gate = p->batch.x.data, p->batch.x.data = NULL),      \
      DSV4_ERROR_NULL)                                                                                          \
    X(previous_is_next, p->carried[0].previous = (dsv4_state *)(uintptr_t)p->carried[0].next, DSV4_ERROR_STATE) \
    X(previous_is_another_state, p->carried[0].previous = p->segments[1].state, DSV4_ERROR_STATE)               \
    X(next_is_another_previous, p->carried[1].previous = (dsv4_state *)(uintptr_t)p->carried[0].next,           \
      DSV4_ERROR_STATE)                                                                                         \
    X(previous_twice, p->carried[0].previous = p->carried[1].previous, DSV4_ERROR_STATE)
#define SPOIL_CALL(name, code, status) \
    static void spoil_##name(bad_backward_parts *p) { (void)(code); }
BAD_BACKWARD_CALLS(SPOIL_CALL)

static const struct {
    const char *name;
    void (*spoil)(bad_backward_parts *p);
    dsv4_status status;
} bad_backward_calls[] = {
#define BAD_CALL_ROW(name, code, status) {#name, spoil_##name, status},
    BAD_BACKWARD_CALLS(BAD_CALL_ROW)};
enum { BAD_BACKWARD_CALL_COUNT = sizeof bad_backward_calls / sizeof *bad_backward_calls };

/* Two parts of a sequence in one call, the last but one and the last; refused, it changes nothing; put right, it
 * works. */
TEST is_refused_and_changes_nothing(int i) {
    static const int64_t lengths[] = {5, 6, 9};
    dsv4_config c = small_csa(), another = c;
    another.head_dim += 2;
    workbench w = small_case(&c, 20);
    workbench stranger = small_case(&another, 20);
    backward_parts parts = backward_parts_of(&w, &w.e, lengths, 3);
    dsv4_state *last = workbench_state(&w, 0);
    dsv4_state *const states[4] = {parts.state[1], parts.state[2], parts.gradient[1], last};
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    dsv4_error error = {0};
    dsv4_options options = {NULL, 1, 0}; /* without room for bf16 sums */
    saved before[4];                     /* what a refused call must leave alone */
    bad_backward_parts p = {0};
    ASSERT_EQ(3, parts.count);
    ASSERT_EQ(DSV4_OK, backward_part(&w, &w.e, &parts, 2, gradients_into(&got, w.dout, DSV4_F32), parts.gradient[2]));
    p.e = keep_engine(&w, engine_with(&w.m, &options, NULL));
    for (int k = 0; k < GRADIENTS; k++) memset(got.data[k], POISON, got.bytes[k]);
    p.segments[0] = segment_new(5, 6, 5, 1, parts.state[1]);
    p.segments[1] = segment_new(11, 9, 11, 2, parts.state[2]);
    p.carried[0] = (dsv4_segment_gradient){parts.gradient[2], parts.gradient[1]};
    p.carried[1] = (dsv4_segment_gradient){NULL, last};
    p.batch = backward_batch(&w, p.segments, 2);
    p.batch.drop_tail = 0;
    p.to = gradients_into(&got, w.dout, DSV4_F32);
    p.to.segments = p.carried;
    p.other = workbench_state(&stranger, 0);
    p.fresh = workbench_state(&w, 0);
    p.untrained = workbench_engine(&w, NULL, NULL);
    const bad_backward_parts right = p;
    for (int k = 0; k < 4; k++) before[k] = workbench_saved(&w, states[k]);
    bad_backward_calls[i].spoil(&p);
    const dsv4_status status = dsv4_backward(p.e.compressor, &p.batch, &p.to, p.e.workspace, &error);
    ASSERT_STR_EQ(dsv4_status_text(bad_backward_calls[i].status), dsv4_status_text(status));
    ASSERT_EQ(bad_backward_calls[i].status, error.status);
    ASSERT(strlen(error.text) > 0);
    ASSERT(gradients_untouched(&got));
    for (int k = 0; k < 4; k++) ASSERT(is_still(states[k], &before[k]));
    p = right;
    p.batch.segments = p.segments;
    p.to.segments = p.carried;
    ASSERT_EQ(DSV4_OK, dsv4_backward(p.e.compressor, &p.batch, &p.to, p.e.workspace, &error));
    backward_parts_free(&parts);
    workbench_free(&stranger);
    workbench_free(&w);
    PASS();
}

/* A matrix of zeros but for its data is one whose type was forgotten. */
TEST a_type_not_given_and_a_short_stride_are_refused_by_name(void) {
    static const char *const names[] = {"x", "dout", "dx", "dwkv", "dwgate", "dape", "dnorm"};
    const dsv4_config c = small_csa();
    workbench w = small_case(&c, 2 * c.ratio);
    gradient_set got = workbench_gradients(&w, DSV4_F32);
    for (int i = 0; i < 7; i++)
        for (int stride = 0; stride <= 1; stride++) {
            dsv4_batch b = backward_batch(&w, NULL, 0);
            dsv4_gradients to = gradients_into(&got, w.dout, w.out_dtype);
            dsv4_const_matrix *const read = i == 0 ? &b.x : &to.dout;
            dsv4_matrix *const written = i < 2 ? NULL : gradient_target(&to, i - 2);
            dsv4_error error = {0};
            if (stride)
                *(written ? &written->stride : &read->stride) = 1;
            else
                *(written ? &written->dtype : &read->dtype) = (dsv4_dtype)0;
            ASSERT_EQ(DSV4_ERROR_ARGUMENT, dsv4_backward(w.e.compressor, &b, &to, w.e.workspace, &error));
            const char *words = note(stride ? "stride of %s is 1 " : "dtype of %s is not given", names[i]);
            ASSERTm(words, strstr(error.text, words) != NULL);
            ASSERT(gradients_untouched(&got));
        }
    workbench_free(&w);
    PASS();
}

TEST gradients_of_arrays_that_there_are_not_are_refused(void) {
    dsv4_config c = small_csa();
    c.overlap = 0;
    c.ratio = 1;
    c.no_ape = c.no_gate = 1;
    workbench w = small_case(&c, 3);
    float somewhere[64 * 64] = {0};
    dsv4_batch b = backward_whole_batch(&w);
    for (int which = ORACLE_DWGATE; which <= ORACLE_DAPE; which++) {
        dsv4_gradients to = gradients_into(&w.gradients, w.dout, DSV4_F32);
        gradient_target(&to, which)->data = somewhere;
        ASSERT_EQ(DSV4_ERROR_ARGUMENT, workbench_backward(&w, &b, &to));
    }
    for (int i = 0; i < 64 * 64; i++) ASSERT_EQ(0.0f, somewhere[i]);
    ASSERT_EQ(DSV4_ERROR_NULL, dsv4_backward(w.e.compressor, &b, NULL, w.e.workspace, NULL));
    ASSERT_EQ(DSV4_ERROR_NULL, dsv4_backward(w.e.compressor, NULL, NULL, w.e.workspace, NULL));
    workbench_free(&w);
    PASS();
}

/* ---- All of them ------------------------------------------------------------------------------------------- */

SUITE(right) {
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        RUN_NAMED(note("grad_csa_%s", isa), agrees_with_pytorch, "grad_csa", isa);
        RUN_NAMED(note("grad_hca_%s", isa), agrees_with_pytorch, "grad_hca", isa);
    }
    for (uint64_t seed = 1; seed <= 24; seed++) {
        RUN_NAMED(note("%d", (int)seed), agrees_with_central_differences, seed);
        RUN_NAMED(note("%d", (int)seed), the_oracle_agrees_with_itself, seed);
    }
    FOR_SHORT_AND_LONG_SHAPES(agrees_with_the_chain_rule_in_double, of);
    RUN_TEST(a_wide_gate_beside_a_narrow_wkv_agrees_with_the_chain_rule);
}

SUITE(same_bits) {
    FOR_SHORT_AND_LONG_SHAPES(every_kernel_set_gives_the_same_gradients, of);
    FOR_SHORT_AND_LONG_SHAPES(every_parallel_for_gives_the_same_gradients, of);
    FOR_SHORT_AND_LONG_SHAPES(every_cut_gives_the_same_dx, of);
    FOR_EVERY_LONG_SHAPE(cuts_at_multiples_of_256_give_the_same_sums, of);
    RUN_TESTp(thousands_of_tokens_give_the_sums_of_their_parts, 64, 10, DSV4_F32);
    RUN_TESTp(thousands_of_tokens_give_the_sums_of_their_parts, 64, 10, DSV4_BF16);
    RUN_TESTp(thousands_of_tokens_give_the_sums_of_their_parts, 33, 120, DSV4_F32);
    FOR_EVERY_LONG_SHAPE(blocks_are_counted_from_the_first_token, of);
    FOR_SHORT_AND_LONG_SHAPES(kept_projections_give_the_bits_of_recomputing, of);
    FOR_SHORT_AND_LONG_SHAPES(packed_documents_are_separate_calls_in_order, of);
    RUN_TEST(whole_sequences_and_parts_share_a_call);
    RUN_TEST(a_document_may_end_anywhere_in_a_chunk);
    RUN_TEST(hundreds_of_short_documents_are_separate_calls_in_order);
    FOR_EVERY(carried_cases, 3, what_many_parts_carry_is_what_each_carries_alone, &carried_cases[i]);
}

SUITE(where_gradients_go) {
    FOR_EVERY_SHAPE(each_gradient_is_optional_and_strides_do_not_matter, of);
    FOR_EVERY_SHAPE(accumulating_goes_on_from_what_the_arrays_hold, of);
    for (int i = 0; i < 4 * SHAPE_COUNT; i++) {
        const dsv4_dtype dtype = i / 2 % 2 ? DSV4_BF16 : DSV4_F32;
        RUN_NAMED(note("%s_%s%s", shapes[i / 4].name, dtype_name(dtype), i % 2 ? "_accumulating" : ""),
                  parameters_and_their_gradients_may_have_strides, &shapes[i / 4], dtype, i % 2);
    }
    FOR_EVERY_SHAPE(no_segments_are_one_whole_sequence, of);
    FOR_SHORT_AND_LONG_SHAPES(bf16_gradients_are_the_rounded_fp32_ones, of);
    FOR_EVERY_LONG_SHAPE(bf16_gradients_accumulate_too, of);
    FOR_SHORT_AND_LONG_SHAPES(the_carried_gradient_can_be_had_alone, of);
    FOR_EVERY_SHAPE(training_changes_no_entry_and_advances_no_state, of);
    FOR_EVERY_LONG_SHAPE(the_workspace_does_not_grow_with_the_sequence, of);
}

SUITE(extremes) {
    RUN_TESTp(the_pad_sends_no_gradient, 0.0f);
    RUN_TESTp(the_pad_sends_no_gradient, -INFINITY);
    RUN_TEST(a_pad_that_weighs_nothing_may_be_any);
    RUN_TESTp(saturated_gates_give_finite_gradients, 30.0f);
    RUN_TESTp(saturated_gates_give_finite_gradients, 1e4f);
    RUN_TESTp(saturated_gates_give_finite_gradients, 1e30f);
    RUN_TEST(a_gate_that_has_chosen_gets_no_gradient);
    RUN_TEST(windows_of_equal_scores_give_finite_gradients);
    RUN_TESTp(zeros_give_finite_gradients, 1e-6f);
    RUN_TESTp(zeros_give_finite_gradients, 1e-20f);
    FOR_EVERY_SHAPE(the_dropped_tail_gets_no_gradient, of);
    RUN_TEST(a_call_without_windows_gives_zeros);
    RUN_TEST(a_call_without_tokens_gives_zeros);
}

SUITE(refused) {
    FOR_EVERY(bad_backward_calls, BAD_BACKWARD_CALL_COUNT, is_refused_and_changes_nothing, i);
    RUN_TEST(a_type_not_given_and_a_short_stride_are_refused_by_name);
    RUN_TEST(gradients_of_arrays_that_there_are_not_are_refused);
}

SUITE(gradients) {
    right();
    same_bits();
    where_gradients_go();
    extremes();
    refused();
}

TESTS_MAIN(gradients);
