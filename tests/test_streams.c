/* Streams: a sequence may come in any cut, be taken back, saved, copied, and share its calls with others; the entries
 * are those of the one call, bit for bit. */

#include "runner.h"
#include "workbench.h"

/* ---- Cuts -------------------------------------------------------------------------------------------------- */

TEST any_cut_into_calls_gives_the_bits_of_the_one_call(const shape *of) {
    workbench w = workbench_new(of, 6, 1);
    dice d = {11};
    for (int round = 0; round < 30; round++) {
        int64_t lengths[5];
        for (int i = 0; i < 5; i++) lengths[i] = round < 12 ? round + 1 : dice_below(&d, 3 * w.config.ratio + 1);
        lengths[4]++; /* so that five of them are never nothing */
        const int64_t depths[] = {0, depth_for_weights(&w.config), 1, w.config.ratio};
        const int64_t depth = depths[round % 4];
        results cut = workbench_results(&w);
        dsv4_error error = {0};
        ASSERTm(note("%s", error.text), compress_cut_at(&w.e, &w.s, &cut, lengths, 5, depth, &error) == DSV4_OK);
        ASSERT(depth < depths[1] || !*cut.no_weights);
        ASSERT_SAME_BITS(&w.whole, &cut, note("cut %d", round));
    }
    workbench_free(&w);
    PASS();
}

/* Sequences of many hundred tokens, cut near and far from where the work is divided inside. */
TEST a_long_sequence_may_be_cut_anywhere(const shape *of) {
    workbench w = workbench_new(of, shape_windows(of, 0), 21);
    static const int64_t cuts[][5] = {{1, 1, 1, 1, 1},         {223, 224, 225, 1, 2}, {127, 128, 129, 3, 5},
                                      {500, 7, 300, 299, 301}, {17, 40, 2, 0, 13},    {899, 1, 900, 1, 1}};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        const int64_t depths[] = {0, 3, depth_for_weights(&w.config)};
        for (int k = 0; k < 3; k++) {
            results cut = workbench_results(&w);
            ASSERT_EQ(DSV4_OK, compress_cut_at(&w.e, &w.s, &cut, cuts[i], 5, depths[k], NULL));
            ASSERT_SAME_BITS(&w.whole, &cut, note("cut %d", (int)i));
        }
    }
    workbench_free(&w);
    PASS();
}

/* The counters, and the number of entries that a call announces, at every single token. */
TEST a_state_counts_its_tokens_and_foretells_its_entries(const shape *of) {
    workbench w = workbench_new(of, 3, 2);
    int64_t ratio = w.config.ratio;
    dsv4_state *state = workbench_state(&w, 2);
    results r = workbench_results(&w);
    for (int64_t t = 0; t < w.s.tokens; t++) {
        ASSERT_EQ_FMT((int)t, (int)dsv4_state_tokens(state), "%d");
        ASSERT_EQ_FMT((int)least(t, 2), (int)dsv4_state_reach(state), "%d");
        if (t > 0) ASSERT_EQ_FMT((int)(w.s.position + t), (int)dsv4_state_position(state), "%d");
        for (int64_t count = 0; count <= 2 * ratio; count++)
            ASSERT_EQ_FMT((int)((t + count) / ratio - t / ratio), (int)dsv4_entry_count(&w.config, state, count), "%d");
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, t, t + 1, NULL));
    }
    ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    ASSERT_EQ_FMT(0, (int)dsv4_state_tokens(NULL), "%d");
    const dsv4_config longest = {.ratio = INT64_MAX}; /* of a state that has some of a window */
    ASSERT(dsv4_entry_count(&longest, state, INT64_MAX - 1) == 1);
    workbench_free(&w);
    PASS();
}

TEST an_empty_segment_changes_nothing(const shape *of) {
    workbench w = workbench_new(of, 2, 3);
    dsv4_state *state = workbench_state(&w, 3);
    results r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, w.config.ratio, NULL));
    saved before = workbench_saved(&w, state);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, w.config.ratio, w.config.ratio, NULL));
    ASSERT(is_still(state, &before));
    workbench_free(&w);
    PASS();
}

/* Decoding calls this with one token and, most of the time, no room for an entry. */
TEST a_call_that_closes_no_window_needs_no_out(void) {
    workbench w = workbench_new(&shapes[0], 2, 4);
    dsv4_state *state = workbench_state(&w, 0);
    dsv4_segment one = segment_new(0, 1, w.s.position, 0, state);
    dsv4_batch b = {0};
    b.x = (dsv4_const_matrix){w.s.x, w.s.dtype, 0};
    b.tokens = 1;
    b.segments = &one;
    b.segment_count = 1;
    dsv4_error error = {0};
    ASSERTm(note("%s", error.text), dsv4_compress(w.e.compressor, &b, w.e.workspace, &error) == DSV4_OK);
    ASSERT_EQ_FMT(1, (int)dsv4_state_tokens(state), "%d");
    workbench_free(&w);
    PASS();
}

/* ---- Roll back --------------------------------------------------------------------------------------------- */

/* A sequence is written, in part taken back and written anew, many times over; what stands at the end is what
 * counts. */
TEST taking_back_is_as_if_the_tokens_had_never_come(const shape *of, int64_t depth) {
    workbench w = workbench_new(of, shape_windows(of, 8), 5);
    sequence drafts = keep_sequence(&w, shape_sequence(of, w.s.tokens, 99)),
             mixed = keep_sequence(&w, shape_sequence(of, w.s.tokens, 98));
    mixed.position = w.s.position;
    size_t row = (size_t)w.config.hidden_dim * dsv4_dtype_size(w.s.dtype);
    dice d = {(uint64_t)depth};
    dsv4_state *state = workbench_state(&w, depth);
    results r = workbench_results(&w);
    for (int64_t t = 0; t < w.s.tokens;) {
        int64_t count = least(1 + dice_below(&d, depth + w.config.ratio + 1), w.s.tokens - t);
        int64_t back = dice_below(&d, least(depth, count) + 1);
        /* the first count - back tokens are the sequence's own, the rest a draft that is not accepted */
        memcpy((char *)mixed.x + (size_t)t * row, (char *)drafts.x + (size_t)t * row, (size_t)count * row);
        memcpy((char *)mixed.x + (size_t)t * row, (char *)w.s.x + (size_t)t * row, (size_t)(count - back) * row);
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &mixed, &r, state, t, t + count, NULL));
        ASSERT(dsv4_state_reach(state) >= back);
        ASSERT_EQ(DSV4_OK, dsv4_state_roll_back(state, back, NULL));
        t += count - back;
        ASSERT_EQ_FMT((int)t, (int)dsv4_state_tokens(state), "%d");
        if (t > 0) ASSERT_EQ_FMT((int)(w.s.position + t), (int)dsv4_state_position(state), "%d");
    }
    for (int stage = *r.no_weights ? STAGE_POOLED : STAGE_WEIGHTS; stage < STAGE_COUNT; stage++)
        ASSERTm(stage_name(stage), !memcmp(w.whole.stage[stage], r.stage[stage], r.bytes[stage]));
    workbench_free(&w);
    PASS();
}

TEST a_state_from_which_all_is_taken_back_is_a_new_one(const shape *of) {
    workbench w = workbench_new(of, 2, 24);
    results r = workbench_results(&w);
    dsv4_state *state = workbench_state(&w, 3);
    saved fresh = workbench_saved(&w, state);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, 2, NULL));
    ASSERT_EQ(DSV4_OK, dsv4_state_roll_back(state, 2, NULL));
    ASSERT(is_still(state, &fresh));
    ASSERT_EQ_FMT(0, (int)dsv4_state_position(state), "%d");
    workbench_free(&w);
    PASS();
}

/* Taking back in two steps is taking back once; what can still be taken back shrinks with each. */
TEST reach_shrinks_as_tokens_are_taken_back(const shape *of) {
    workbench w = workbench_new(of, 5, 6);
    int64_t depth = 2 * w.config.ratio + 1;
    results r = workbench_results(&w);
    for (int64_t fed = 0; fed <= w.s.tokens; fed++) {
        dsv4_state *state = workbench_state(&w, depth);
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, fed, NULL));
        for (int64_t left = least(fed, depth); left > 0; left--) {
            ASSERT_EQ_FMT((int)left, (int)dsv4_state_reach(state), "%d");
            ASSERT_EQ(DSV4_OK, dsv4_state_roll_back(state, 1, NULL));
        }
        ASSERT_EQ_FMT(0, (int)dsv4_state_reach(state), "%d");
        int64_t kept = dsv4_state_tokens(state);
        ASSERT_EQ_FMT((int)(fed - least(fed, depth)), (int)kept, "%d");
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, kept, w.s.tokens, NULL));
        ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    }
    workbench_free(&w);
    PASS();
}

TEST taking_back_too_much_is_refused_and_changes_nothing(void) {
    static const struct {
        int64_t depth, fed, back;
    } cases[] = {{0, 5, 1}, {3, 9, 4}, {3, 2, 3}, {7, 0, 1}, {7, 20, INT64_MAX}, {2, 9, -1}, {2, 9, INT64_MIN}};
    workbench w = workbench_new(&shapes[0], 5, 7);
    results r = workbench_results(&w);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        dsv4_state *state = workbench_state(&w, cases[i].depth);
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, cases[i].fed, NULL));
        saved before = workbench_saved(&w, state);
        dsv4_error error = {0};
        dsv4_status status = dsv4_state_roll_back(state, cases[i].back, &error);
        ASSERT_EQ_FMT((int)DSV4_ERROR_DEPTH, (int)status, "%d");
        char text[32];
        snprintf(text, sizeof text, "%lld", (long long)cases[i].back);
        ASSERTm(note("%s", error.text), strstr(error.text, text) != NULL);
        ASSERT(is_still(state, &before));
    }
    workbench_free(&w);
    PASS();
}

/* Verify k drafted tokens at once, keep a of them: for every k and a the stream is that of serial decoding. */
TEST every_accepted_prefix_equals_serial_decoding(const shape *of) {
    workbench w = workbench_new(of, 4, 8);
    sequence drafts = keep_sequence(&w, shape_sequence(of, w.s.tokens, 97));
    drafts.position = w.s.position;
    size_t row = (size_t)w.config.hidden_dim * dsv4_dtype_size(w.s.dtype);
    int64_t most = 2 * w.config.ratio + 2, start = w.config.ratio - 1;
    results r = workbench_results(&w), scratch = workbench_results(&w);
    for (int64_t k = 1; k <= least(most, w.s.tokens - start); k++) {
        for (int64_t a = 0; a <= k; a++) {
            dsv4_state *state = workbench_state(&w, k);
            for (int64_t t = 0; t < start; t++)
                ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, t, t + 1, NULL));
            memcpy((char *)drafts.x + (size_t)start * row, (char *)w.s.x + (size_t)start * row, (size_t)a * row);
            ASSERT_EQ(DSV4_OK, compress_part(&w.e, &drafts, &scratch, state, start, start + k, NULL));
            ASSERT_EQ(DSV4_OK, dsv4_state_roll_back(state, k - a, NULL));
            dsv4_state *serial = workbench_state(&w, 0);
            for (int64_t t = 0; t < start + a; t++)
                ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, serial, t, t + 1, NULL));
            for (int64_t t = start + a; t < w.s.tokens; t++)
                ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &scratch, state, t, t + 1, NULL));
            for (int64_t t = start + a; t < w.s.tokens; t++)
                ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, serial, t, t + 1, NULL));
            size_t entry = scratch.bytes[STAGE_OUT] / (size_t)scratch.entries,
                   first = (size_t)((start + a) / w.config.ratio) * entry;
            ASSERTm(note("k %d a %d", (int)k, (int)a),
                    !memcmp((char *)r.stage[STAGE_OUT] + first, (char *)scratch.stage[STAGE_OUT] + first,
                            r.bytes[STAGE_OUT] - first));
        }
    }
    ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    workbench_free(&w);
    PASS();
}

/* ---- Save, restore, copy, reset ---------------------------------------------------------------------------- */

typedef enum { BY_BYTES, BY_COPY } way;

static dsv4_status transfer(way how, dsv4_state *to, const dsv4_state *from) {
    if (how == BY_COPY) return dsv4_state_copy(to, from, NULL);
    saved s = saved_of(from);
    dsv4_status status = dsv4_state_restore(to, s.bytes, s.size, NULL);
    free(s.bytes);
    return status;
}

/* At every cut, between any two depths: the new state goes on as the old one would, also after taking back. */
TEST a_transferred_state_goes_on_as_the_old_one(const shape *of, way how) {
    workbench w = workbench_new(of, 4, 9);
    const int64_t depths[] = {0, 1, w.config.ratio + 1};
    results r = workbench_results(&w);
    for (int64_t cut = 0; cut <= w.s.tokens; cut++) {
        for (int i = 0; i < 9; i++) {
            dsv4_state *from = workbench_state(&w, depths[i / 3]), *to = workbench_state(&w, depths[i % 3]);
            ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, to, 0, least(cut, 3), NULL)); /* what `to` was is gone */
            ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, from, 0, cut, NULL));
            ASSERT_EQ(DSV4_OK, transfer(how, to, from));
            ASSERT_EQ_FMT((int)cut, (int)dsv4_state_tokens(to), "%d");
            if (cut > 0) ASSERT_EQ_FMT((int)(w.s.position + cut), (int)dsv4_state_position(to), "%d");
            int64_t reach = least(least(depths[i / 3], depths[i % 3]), cut);
            ASSERT_EQ_FMT((int)reach, (int)dsv4_state_reach(to), "%d");
            ASSERT_EQ(DSV4_OK, dsv4_state_roll_back(to, reach, NULL));
            ASSERT_EQ(DSV4_ERROR_DEPTH, dsv4_state_roll_back(to, 1, NULL));
            ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, to, cut - reach, w.s.tokens, NULL));
            ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
        }
    }
    workbench_free(&w);
    PASS();
}

/* Source and destination go separate ways after a copy. */
TEST a_copy_is_independent_of_its_source(void) {
    workbench w = workbench_new(&shapes[0], 4, 10);
    sequence other = keep_sequence(&w, shape_sequence(&shapes[0], w.s.tokens, 96));
    other.position = w.s.position;
    dsv4_state *a = workbench_state(&w, 0), *b = workbench_state(&w, 0);
    results r = workbench_results(&w), scratch = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, a, 0, 6, NULL));
    ASSERT_EQ(DSV4_OK, dsv4_state_copy(b, a, NULL));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &other, &scratch, b, 6, w.s.tokens, NULL));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, a, 6, w.s.tokens, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    ASSERT_EQ(DSV4_OK, dsv4_state_copy(a, a, NULL));
    ASSERT_EQ_FMT((int)w.s.tokens, (int)dsv4_state_tokens(a), "%d");
    workbench_free(&w);
    PASS();
}

TEST a_reset_state_is_a_new_one(const shape *of) {
    workbench w = workbench_new(of, 3, 11);
    results r = workbench_results(&w);
    for (int64_t fed = 1; fed <= w.s.tokens; fed++) {
        dsv4_state *state = workbench_state(&w, 5), *fresh = workbench_state(&w, 5);
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, fed, NULL));
        ASSERT_EQ(DSV4_OK, dsv4_state_reset(state, NULL));
        ASSERT_EQ_FMT(0, (int)dsv4_state_tokens(state), "%d");
        ASSERT_EQ_FMT(0, (int)dsv4_state_reach(state), "%d");
        saved empty = workbench_saved(&w, fresh);
        ASSERT(is_still(state, &empty));
        if (fed % 2) { /* the sequence may begin elsewhere now */
            w.s.position += fed;
            ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &w.whole, NULL));
        }
        ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, w.s.tokens, NULL));
        ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    }
    workbench_free(&w);
    PASS();
}

/* Any bit turned, any byte missing, any byte too many. */
TEST damaged_bytes_are_rejected_and_the_state_unchanged(const shape *of) {
    workbench w = workbench_new(of, 3, 12);
    results r = workbench_results(&w);
    dsv4_state *source = workbench_state(&w, 2), *state = workbench_state(&w, 2);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, source, 0, w.s.tokens - 1, NULL));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, w.config.ratio, NULL));
    saved good = workbench_saved(&w, source), before = workbench_saved(&w, state);
    unsigned char *bytes = workbench_memory(&w, good.size + 1);
    memcpy(bytes, good.bytes, good.size);
    bytes[good.size] = 0;
    dsv4_error error = {0};
    for (size_t i = 0; i < good.size; i++) {
        bytes[i] ^= (unsigned char)(1u << i % 8);
        ASSERTm(note("byte %d", (int)i), dsv4_state_restore(state, bytes, good.size, &error) == DSV4_ERROR_DATA);
        bytes[i] = good.bytes[i];
    }
    for (size_t size = 0; size < good.size; size++)
        ASSERTm(note("%d bytes", (int)size), dsv4_state_restore(state, bytes, size, &error) == DSV4_ERROR_DATA);
    ASSERT_EQ(DSV4_ERROR_DATA, dsv4_state_restore(state, bytes, good.size + 1, &error));
    ASSERT(error.text[0] != 0);
    ASSERT(is_still(state, &before));
    ASSERT_EQ(DSV4_OK, dsv4_state_restore(state, bytes, good.size, &error));
    ASSERT(is_still(state, &good));
    workbench_free(&w);
    PASS();
}

/* Sets one field of saved bytes. */
static void forge(unsigned char *bytes, size_t field, uint64_t number) {
    for (int i = 0; i < 8; i++) bytes[field + (size_t)i] = (unsigned char)(number >> (8 * i));
}

/* The checksum that ends saved bytes; the test that uses it makes sure that it is. */
static void sign(unsigned char *bytes, size_t size) { forge(bytes, size - 8, hash_bytes(hash_start, bytes, size - 8)); }

/* Bytes whose checksum holds, but whose numbers no state of this configuration has: each field of the header set to
 * numbers small and large, and rows missing or added. */
TEST forged_bytes_are_rejected_and_the_state_unchanged(const shape *of) {
    static const uint64_t numbers[] = {
        0, 1, 2, 1000, 1001, UINT64_MAX / 4, (uint64_t)1 << 61, (uint64_t)1 << 62, (uint64_t)1 << 63, UINT64_MAX};
    workbench w = workbench_new(of, 3, 22);
    results r = workbench_results(&w);
    dsv4_state *source = workbench_state(&w, 2), *state = workbench_state(&w, 2);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, source, 0, w.s.tokens - 1, NULL));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, w.config.ratio, NULL));
    saved good = workbench_saved(&w, source), before = workbench_saved(&w, state);
    uint64_t ratio = (uint64_t)w.config.ratio;
    unsigned char *bytes = workbench_memory(&w, good.size + 64);
    memset(bytes, 0, good.size + 64);
    memcpy(bytes, good.bytes, good.size);
    sign(bytes, good.size);
    ASSERT_MEM_EQ(good.bytes, bytes, good.size);
    for (size_t field = 0; field < 64; field += 8) {
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            forge(bytes, field, numbers[i]);
            sign(bytes, good.size);
            int changed = memcmp(bytes, good.bytes, good.size) != 0;
            int any_position = field == 24 && numbers[i] >> 62 == 0;
            int same_rows = field == 40 && numbers[i] / ratio == (uint64_t)(w.s.tokens - 3) / ratio; /* deeper state */
            int nothing_waits =
                ratio == 1 && !w.config.overlap && (field == 32 || field == 40); /* as many as you like */
            if (changed && !any_position && !same_rows && !nothing_waits) {
                ASSERTm(note("field %d, number %d", (int)field, (int)i),
                        dsv4_state_restore(state, bytes, good.size, NULL) == DSV4_ERROR_DATA);
            }
            memcpy(bytes, good.bytes, good.size);
        }
    }
    for (size_t change = 4; change <= 64; change += 4) {
        sign(bytes, good.size + change);
        ASSERT_EQ(DSV4_ERROR_DATA, dsv4_state_restore(state, bytes, good.size + change, NULL));
        if (good.size - change >= 72) {
            memcpy(bytes, good.bytes, good.size);
            sign(bytes, good.size - change);
            ASSERT_EQ(DSV4_ERROR_DATA, dsv4_state_restore(state, bytes, good.size - change, NULL));
        }
        memcpy(bytes, good.bytes, good.size);
    }
    ASSERT(is_still(state, &before));
    workbench_free(&w);
    PASS();
}

/* A stream ends below position 2^62, wherever it began. */
TEST saved_positions_beyond_the_last_are_rejected(const shape *of) {
    workbench w = workbench_new(of, 2, 23);
    results r = workbench_results(&w);
    dsv4_state *source = workbench_state(&w, 0), *state = workbench_state(&w, 0);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, source, 0, w.s.tokens, NULL));
    saved good = workbench_saved(&w, source);
    const int64_t limit = (int64_t)1 << 62, tokens = limit / 2 / of->config.ratio * of->config.ratio;
    for (int64_t beyond = -1; beyond <= 1; beyond++) {
        forge(good.bytes, 24, (uint64_t)(limit - tokens + beyond));
        forge(good.bytes, 32, (uint64_t)tokens);
        forge(good.bytes, 40, (uint64_t)tokens);
        sign(good.bytes, good.size);
        ASSERT_EQ(beyond < 0 ? DSV4_OK : DSV4_ERROR_DATA, dsv4_state_restore(state, good.bytes, good.size, NULL));
    }
    ASSERT(dsv4_state_position(state) == limit - 1);
    workbench_free(&w);
    PASS();
}

/* Saved bytes may stand at any address. */
TEST saved_bytes_need_no_alignment(void) {
    workbench w = workbench_new(&shapes[1], 2, 13);
    results r = workbench_results(&w);
    dsv4_state *state = workbench_state(&w, 3), *other = workbench_state(&w, 3);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, 7, NULL));
    saved good = workbench_saved(&w, state);
    unsigned char *bytes = workbench_memory(&w, good.size + 8);
    for (int offset = 0; offset < 8; offset++) {
        ASSERT_EQ(DSV4_OK, dsv4_state_save(state, bytes + offset, good.size, NULL, NULL));
        ASSERT_MEM_EQ(good.bytes, bytes + offset, good.size);
        ASSERT_EQ(DSV4_OK, dsv4_state_reset(other, NULL));
        ASSERT_EQ(DSV4_OK, dsv4_state_restore(other, bytes + offset, good.size, NULL));
        ASSERT(is_still(other, &good));
    }
    workbench_free(&w);
    PASS();
}

/* ---- Other configurations ---------------------------------------------------------------------------------- */

enum { OTHER_CONFIGS = 15 };

/* Each differs from `of` in one field. */
static void other_configs(const dsv4_config *of, dsv4_config others[OTHER_CONFIGS]) {
    for (int i = 0; i < OTHER_CONFIGS; i++) others[i] = *of;
    others[0].hidden_dim++;
    others[1].head_dim += 2;
    others[2].ratio++;
    others[3].rope_dim -= 2;
    others[4].overlap = 0;
    others[5].no_ape = 1;
    others[6].rounding ^= DSV4_ROUND_PROJECTION;
    others[7].eps = 1e-5f;
    others[8].pad_gate = -1e4f;
    others[9].rope_theta = 10000;
    others[10].yarn_factor = 4;
    others[11].yarn_orig_ctx = 4096;
    others[12].yarn_beta_fast = 16;
    others[13].sums = DSV4_SUMS_TILES;
    others[14].yarn_beta_slow = 2;
}

/* Whether a message names the configurations, by the fingerprints that their saved states hold, of both sides. */
static int names_both(const dsv4_error *error, const saved *a, const saved *b) {
    const saved *const sides[2] = {a, b};
    for (int side = 0; side < 2; side++) {
        char text[20];
        unsigned long long fingerprint = 0;
        for (int i = 15; i >= 8; i--) fingerprint = fingerprint << 8 | sides[side]->bytes[i];
        snprintf(text, sizeof text, "%016llx", fingerprint);
        if (!strstr(error->text, text)) return 0;
    }
    return 1;
}

TEST a_state_of_another_configuration_is_rejected_everywhere(int field) {
    workbench w = workbench_new(&shapes[0], 3, 14);
    dsv4_config others[OTHER_CONFIGS];
    other_configs(&w.config, others);
    model m = keep_model(&w, model_of(&others[field], DSV4_BF16, 1));
    engine other = keep_engine(&w, engine_new(&m, NULL, NULL));
    results r = workbench_results(&w);
    dsv4_state *ours = workbench_state(&w, 1), *theirs = keep_state(&w, state_new(&other, 1));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, ours, 0, 5, NULL));
    saved of_ours = workbench_saved(&w, ours), of_theirs = workbench_saved(&w, theirs);
    dsv4_error error = {0};

#define ASSERT_REJECTED(status, call)                                              \
    do {                                                                           \
        memset(&error, 0, sizeof error);                                           \
        ASSERT_EQ(status, call);                                                   \
        ASSERTm(note("%s", error.text), names_both(&error, &of_ours, &of_theirs)); \
    } while (0)
    ASSERT_REJECTED(DSV4_ERROR_STATE, dsv4_state_copy(ours, theirs, &error));
    ASSERT_REJECTED(DSV4_ERROR_STATE, dsv4_state_copy(theirs, ours, &error));
    ASSERT_REJECTED(DSV4_ERROR_DATA, dsv4_state_restore(ours, of_theirs.bytes, of_theirs.size, &error));
    ASSERT_REJECTED(DSV4_ERROR_DATA, dsv4_state_restore(theirs, of_ours.bytes, of_ours.size, &error));
    results untouched = workbench_results(&w);
    ASSERT_REJECTED(DSV4_ERROR_STATE, compress_part(&w.e, &w.s, &untouched, theirs, 0, 5, &error));
    ASSERT(results_untouched(&untouched));
    ASSERT(is_still(ours, &of_ours));
    ASSERT(is_still(theirs, &of_theirs));

    workbench_free(&w);
    PASS();
}

/* Defaults written out are the same configuration; another compressor of it takes the state over. */
TEST a_state_moves_between_compressors_of_one_configuration(void) {
    workbench w = workbench_new(&shapes[0], 3, 15);
    model m = keep_model(&w, model_new(&w.config, shapes[0].param, 15));
    m.config.eps = 1e-6f;
    m.config.rope_theta = 160000;
    m.config.yarn_beta_fast = 32;
    engine other = keep_engine(&w, engine_new(&m, "scalar", NULL));
    results r = workbench_results(&w);
    dsv4_state *state = workbench_state(&w, 0), *moved = keep_state(&w, state_new(&other, 0));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, 0, 5, NULL));
    ASSERT_EQ(DSV4_OK, transfer(BY_BYTES, moved, state));
    ASSERT_EQ(DSV4_OK, compress_part(&other, &w.s, &r, moved, 5, 8, NULL));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, moved, 8, w.s.tokens, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&w.whole, &r));
    workbench_free(&w);
    PASS();
}

/* ---- Several sequences in one call ------------------------------------------------------------------------- */

enum { PARTIES = 5 };

/* Five sequences of one buffer, each cut its own way, their parts sharing calls in any order; one has no state. */
TEST sequences_that_share_calls_do_not_mix(const shape *of) {
    workbench w = workbench_new(of, 15, 16);
    int64_t tokens = w.s.tokens / PARTIES, entries = tokens / w.config.ratio, done[PARTIES] = {0};
    results apart = workbench_results(&w), shared = workbench_results(&w);
    for (int p = 0; p < PARTIES; p++) {
        dsv4_segment alone = segment_new(p * tokens, tokens, 10 * p, p * entries, NULL);
        dsv4_batch b = batch_new(&w.s, &apart, &alone, 1);
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    }
    dice d = {17};
    dsv4_state *states[PARTIES] = {NULL};
    for (int p = 1; p < PARTIES; p++) states[p] = workbench_state(&w, depth_for_weights(&w.config) + p);
    for (int64_t left = w.s.tokens; left > 0;) {
        dsv4_segment segments[PARTIES];
        int count = 0, first = (int)dice_below(&d, PARTIES);
        for (int i = 0; i < PARTIES; i++) {
            int p = (first + i) % PARTIES;
            int64_t some = least(dice_below(&d, 2 * w.config.ratio + 2), tokens - done[p]);
            if (p == 0) some = done[0] ? 0 : tokens;
            if (some == 0) continue;
            segments[count++] = segment_new(p * tokens + done[p], some, 10 * p + done[p],
                                            p * entries + done[p] / w.config.ratio, states[p]);
            done[p] += some;
            left -= some;
        }
        dsv4_batch b = batch_new(&w.s, &shared, segments, count);
        dsv4_error error = {0};
        ASSERTm(note("%s", error.text), dsv4_compress(w.e.compressor, &b, w.e.workspace, &error) == DSV4_OK);
    }
    ASSERT_SAME_BITS(&apart, &shared, "in shared calls");
    workbench_free(&w);
    PASS();
}

/* Decoding hundreds of sequences whose windows all close in the same call. */
TEST hundreds_of_windows_close_in_one_call(const shape *of) {
    enum { SEQUENCES = 300 };
    workbench w = workbench_new(of, 2 * SEQUENCES, 23);
    int64_t ratio = w.config.ratio, tokens = 2 * ratio;
    results apart = workbench_results(&w), shared = workbench_results(&w);
    dsv4_segment segments[SEQUENCES];
    dsv4_state *states[SEQUENCES];
    for (int i = 0; i < SEQUENCES; i++) {
        segments[i] = segment_new(i * tokens, tokens, i, 2 * i, NULL);
        states[i] = workbench_state(&w, depth_for_weights(&w.config));
    }
    dsv4_batch b = batch_new(&w.s, &apart, segments, SEQUENCES);
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    for (int64_t t = 0; t < tokens; t++) {
        for (int i = 0; i < SEQUENCES; i++)
            segments[i] = segment_new(i * tokens + t, 1, i + t, 2 * i + t / ratio, states[i]);
        b = batch_new(&w.s, &shared, segments, SEQUENCES);
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    }
    ASSERT_SAME_BITS(&apart, &shared, "in shared calls");
    workbench_free(&w);
    PASS();
}

/* Any number of sequences that close a window with one token each, and then one that closes several. */
TEST windows_of_one_token_and_of_many_close_in_one_call(const shape *of) {
    enum { MOST = 64, WINDOWS = 3 };
    workbench w = workbench_new(of, WINDOWS, 29);
    const int64_t last = w.config.ratio - 1;
    const size_t row = w.whole.bytes[STAGE_OUT] / WINDOWS;
    results r = keep_results(&w, results_new(&w.config, w.out_dtype, w.s.tokens, MOST + WINDOWS));
    const char *expected = w.whole.stage[STAGE_OUT], *out = r.stage[STAGE_OUT];
    dsv4_state *open = workbench_state(&w, depth_for_weights(&w.config)), *states[MOST];
    dsv4_segment segments[MOST + 1];
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, open, 0, last, NULL));
    for (int i = 0; i < MOST; i++) states[i] = workbench_state(&w, depth_for_weights(&w.config));
    for (int n = 1; n <= MOST; n++) {
        for (int i = 0; i < n; i++) {
            ASSERT_EQ(DSV4_OK, dsv4_state_copy(states[i], open, NULL));
            segments[i] = segment_new(last, 1, w.s.position + last, i, states[i]);
        }
        segments[n] = segment_new(0, w.s.tokens, w.s.position, n, NULL);
        dsv4_batch b = batch_new(&w.s, &r, segments, n + 1);
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        for (int i = 0; i < n; i++) ASSERT_MEM_EQ(expected, out + (size_t)i * row, row);
        ASSERT_MEM_EQ(expected, out + (size_t)n * row, WINDOWS * row);
    }
    workbench_free(&w);
    PASS();
}

/* A call that fails at its last segment has not advanced the states of the first. */
TEST a_failed_call_advances_no_state(void) {
    workbench w = workbench_new(&shapes[0], 4, 18);
    results r = workbench_results(&w), untouched = workbench_results(&w);
    dsv4_state *good = workbench_state(&w, depth_for_weights(&w.config) + 2),
               *bad = workbench_state(&w, depth_for_weights(&w.config) + 2);
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, good, 0, 3, NULL));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, bad, 0, 3, NULL));
    saved of_good = workbench_saved(&w, good), of_bad = workbench_saved(&w, bad);
    dsv4_segment segments[2] = {segment_new(3, 5, w.s.position + 3, 0, good),
                                segment_new(8, 5, w.s.position + 4, 2, bad)};
    dsv4_batch b = batch_new(&w.s, &untouched, segments, 2);
    dsv4_error error = {0};
    ASSERT_EQ(DSV4_ERROR_STATE, dsv4_compress(w.e.compressor, &b, w.e.workspace, &error));
    ASSERTm(note("%s", error.text), strstr(error.text, "1004") && strstr(error.text, "1003"));
    ASSERT(results_untouched(&untouched));
    ASSERT(is_still(good, &of_good));
    ASSERT(is_still(bad, &of_bad));
    workbench_free(&w);
    PASS();
}

/* ---- Weights ----------------------------------------------------------------------------------------------- */

/* The stage needs rows; a state that has folded them says how deep it would have to be, and nothing changes. */
TEST weights_of_folded_rows_are_refused(const shape *of) {
    workbench w = workbench_new(of, 3, 25);
    const dsv4_config *c = &w.config;
    const int64_t deep = depth_for_weights(c), seen = 2 * c->ratio - 1;
    dsv4_state *shallow = workbench_state(&w, deep - 1), *enough = workbench_state(&w, deep);
    results r = workbench_results(&w);
    char words[32];
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, shallow, 0, seen, NULL));
    ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, enough, 0, seen, NULL));
    dsv4_segment last = segment_new(seen, 1, w.s.position + seen, seen / c->ratio, shallow);
    dsv4_batch b = batch_new(&w.s, &r, &last, 1);
    dsv4_error error = {0};
    snprintf(words, sizeof words, "depth %d", (int)deep);
    ASSERT_EQ(DSV4_ERROR_STATE, dsv4_compress(w.e.compressor, &b, w.e.workspace, &error));
    ASSERTm(note("%s", error.text), strstr(error.text, words) != NULL && strstr(error.text, "stages.weights") != NULL);
    ASSERT_EQ_FMT((int)seen, (int)dsv4_state_tokens(shallow), "%d");
    b.stages.weights = NULL; /* without the stage it goes on */
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    last.state = enough;
    b = batch_new(&w.s, &r, &last, 1);
    ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
    const size_t entry = w.whole.bytes[STAGE_WEIGHTS] / (size_t)w.whole.entries;
    ASSERT_MEM_EQ((char *)w.whole.stage[STAGE_WEIGHTS] + entry, (char *)r.stage[STAGE_WEIGHTS] + entry, entry);
    workbench_free(&w);
    PASS();
}

/* Asking for weights, where they are to be had, leaves the state that not asking leaves. Calls of several blocks: one
 * that closes no window of 300 tokens, and one that begins within a window. */
TEST weights_change_no_state(const shape *of, int64_t depth, int given) {
    workbench w = workbench_new(of, shape_windows(of, 0), 22);
    const int64_t cuts[] = {0, 10, 290, 560, w.s.tokens};
    dsv4_state *plain = workbench_state(&w, depth), *asked = workbench_state(&w, depth);
    results r = workbench_results(&w);
    int answered = 0;
    for (int i = 0; i + 1 < (int)(sizeof cuts / sizeof *cuts); i++) {
        dsv4_segment segment =
            segment_new(cuts[i], cuts[i + 1] - cuts[i], w.s.position + cuts[i], cuts[i] / w.config.ratio, asked);
        dsv4_batch b = batch_new(&w.s, &r, &segment, 1);
        if (given) {
            b.x.data = NULL;
            b.kv = w.whole.stage[STAGE_KV];
            b.gate = w.config.no_gate ? NULL : w.whole.stage[STAGE_GATE];
        }
        b.stages.weights = r.stage[STAGE_WEIGHTS];
        const dsv4_status status = workbench_compress(&w, &b);
        answered += status == DSV4_OK;
        ASSERT(status == DSV4_OK || status == DSV4_ERROR_STATE);
        b.stages.weights = NULL;
        if (status != DSV4_OK) ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        segment.state = plain;
        ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
        const saved before = workbench_saved(&w, plain);
        ASSERTm(note("%d tokens", (int)cuts[i + 1]), is_still(asked, &before));
    }
    ASSERT(answered > 0);
    workbench_free(&w);
    PASS();
}

/* ---- Size -------------------------------------------------------------------------------------------------- */

/* Three numbers a channel for each open window and the rows of `depth` tokens; or the open windows' rows, where
 * these are fewer numbers or have to be rounded one by one. */
TEST a_state_is_no_larger_than_what_it_waits_for(const shape *of) {
    workbench w = workbench_new(of, 6, 19);
    const dsv4_config *c = &w.config;
    int64_t coff = c->overlap ? 2 : 1, kinds = c->no_gate ? 1 : 2, header = 512;
    results r = workbench_results(&w);
    for (int64_t depth = 0; depth <= 9; depth += 3) {
        int64_t open = (c->ratio - 1) * coff + (c->overlap ? c->ratio : 0); /* the last row closes its window */
        int64_t by_rows = open * kinds * c->head_dim, folded = 3 * coff * c->head_dim;
        int rounded = (c->rounding & (DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT)) != 0;
        int64_t windows = rounded || by_rows < folded ? by_rows : folded;
        int64_t bound = header + (windows + depth * coff * kinds * c->head_dim) * 4;
        size_t size = 0;
        ASSERT_EQ(DSV4_OK, dsv4_state_size(w.e.compressor, depth, &size, NULL));
        ASSERTm(note("%d bytes, bound %d", (int)size, (int)bound), (int64_t)size <= bound);
        dsv4_state *state = workbench_state(&w, depth);
        for (int64_t t = 0; t < w.s.tokens; t++) {
            ASSERT_EQ(DSV4_OK, compress_part(&w.e, &w.s, &r, state, t, t + 1, NULL));
            ASSERT((int64_t)dsv4_state_save_size(state) <= bound);
        }
    }
    workbench_free(&w);
    PASS();
}

/* ---- The suite --------------------------------------------------------------------------------------------- */

SUITE(streams) {
    for (int i = 0; i < SHAPE_COUNT; i++) { /* states that fold rounded scores, and keep rows of them */
        static shape scores[SHAPE_COUNT];
        scores[i] = shapes[i];
        scores[i].config.rounding = DSV4_ROUND_SCORE | DSV4_ROUND_PROJECTION;
        RUN_NAMED(note("%s_rounded_scores", shapes[i].name), any_cut_into_calls_gives_the_bits_of_the_one_call,
                  &scores[i]);
    }
    for (int i = 0; i < SHAPE_COUNT; i++) {
        const uint32_t rounded = DSV4_ROUND_WEIGHT | DSV4_ROUND_PRODUCT;
        if (shapes[i].config.ratio <= 2 || (shapes[i].config.rounding & rounded)) continue; /* these keep their rows */
        RUN_NAMED(shapes[i].name, weights_of_folded_rows_are_refused, &shapes[i]);
    }
    FOR_EVERY_SHAPE(any_cut_into_calls_gives_the_bits_of_the_one_call, of);
    FOR_EVERY_LONG_SHAPE(a_long_sequence_may_be_cut_anywhere, of);
    FOR_EVERY_LONG_SHAPE(taking_back_is_as_if_the_tokens_had_never_come, of, 250);
    for (int k = 0; k < 8; k++) {
        static const int depths[] = {0, 1, 40, 700};
        FOR_EVERY_LONG_SHAPE(weights_change_no_state, of, depths[k / 2], k % 2);
    }
    FOR_EVERY_SHAPE(a_state_counts_its_tokens_and_foretells_its_entries, of);
    FOR_EVERY_SHAPE(an_empty_segment_changes_nothing, of);
    RUN_TEST(a_call_that_closes_no_window_needs_no_out);
    FOR_EVERY_SHAPE(taking_back_is_as_if_the_tokens_had_never_come, of, 1);
    FOR_EVERY_SHAPE(taking_back_is_as_if_the_tokens_had_never_come, of, of->config.ratio);
    FOR_EVERY_SHAPE(taking_back_is_as_if_the_tokens_had_never_come, of, 3 * of->config.ratio + 2);
    FOR_EVERY_SHAPE(a_state_from_which_all_is_taken_back_is_a_new_one, of);
    FOR_EVERY_SHAPE(reach_shrinks_as_tokens_are_taken_back, of);
    RUN_TEST(taking_back_too_much_is_refused_and_changes_nothing);
    FOR_EVERY_SHAPE(every_accepted_prefix_equals_serial_decoding, of);
    FOR_EVERY_SHAPE(a_transferred_state_goes_on_as_the_old_one, of, BY_BYTES);
    FOR_EVERY_SHAPE(a_transferred_state_goes_on_as_the_old_one, of, BY_COPY);
    RUN_TEST(a_copy_is_independent_of_its_source);
    FOR_EVERY_SHAPE(a_reset_state_is_a_new_one, of);
    FOR_EVERY_SHAPE(damaged_bytes_are_rejected_and_the_state_unchanged, of);
    FOR_EVERY_SHAPE(forged_bytes_are_rejected_and_the_state_unchanged, of);
    FOR_EVERY_SHAPE(saved_positions_beyond_the_last_are_rejected, of);
    RUN_TEST(saved_bytes_need_no_alignment);
    for (int field = 0; field < OTHER_CONFIGS; field++)
        RUN_TESTp(a_state_of_another_configuration_is_rejected_everywhere, field);
    RUN_TEST(a_state_moves_between_compressors_of_one_configuration);
    FOR_EVERY_SHAPE(sequences_that_share_calls_do_not_mix, of);
    FOR_EVERY_SHAPE(hundreds_of_windows_close_in_one_call, of);
    for (int i = 0; i < SHAPE_COUNT; i++) {
        if (shapes[i].config.ratio < 9)
            continue; /* the longer the windows, the fewer sequences fill a block with them */
        RUN_NAMED(shapes[i].name, windows_of_one_token_and_of_many_close_in_one_call, &shapes[i]);
    }
    RUN_TEST(a_failed_call_advances_no_state);
    FOR_EVERY_SHAPE(a_state_is_no_larger_than_what_it_waits_for, of);
}

TESTS_MAIN(streams);
