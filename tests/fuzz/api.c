/* Two sequences live through random calls: any cut, both in one call, save and restore, roll back, copy, reset,
 * calls that must fail, another kernel set, another number of threads. Whatever happens, what comes out of every
 * stage is, bit for bit, what compressing each sequence at once gives, and that stands where the oracle says. */

#include "fuzz.h"
#include "oracle_support.h"
#include "workbench.h"

enum { STREAMS = 2, ENGINES = 2, MOST_TOKENS = 60 };

typedef struct stream {
    int64_t token, entry; /* where it begins in the scene's arrays */
    int64_t position;     /* of its first token */
    int64_t seen, reach;  /* what its state should say */
    int64_t depth, spare_depth;
    dsv4_state *state, *spare;
} stream;

/* A workbench with the tokens of all sequences, and what they give at once. */
typedef struct scene {
    workbench w;
    engine engines[ENGINES]; /* the workbench's is the first one */
    int64_t tokens, entries; /* of each sequence: whole windows */
    stream streams[STREAMS];
} scene;

/* ---- Setting the scene ------------------------------------------------------------------------------------- */

static dsv4_config choose_config(choices *c) {
    static const float pads[] = {0, -50, -1e38f, -1e4f};
    dsv4_config config = {0};
    config.hidden_dim = 1 + choose(c, 39);
    config.head_dim = 1 + choose(c, 39);
    config.ratio = 1 + choose(c, 8);
    config.rope_dim = choose(c, 20) * 2;
    if (config.rope_dim > config.head_dim) {
        config.rope_dim = config.head_dim / 2 * 2;
    }
    config.overlap = choose(c, 1);
    config.no_ape = choose(c, 3) == 3;
    config.no_gate = config.ratio == 1 && !config.overlap && choose(c, 1);
    config.rounding = roundings[choose(c, ROUNDING_COUNT - 1)].bits;
    config.pad_gate = pads[choose(c, 3)];
    config.yarn_factor = choose(c, 1) ? 16 : 0;
    config.sums = choose(c, 1) ? DSV4_SUMS_TILES : DSV4_SUMS_PAIRS;
    return config;
}

static dsv4_dtype choose_dtype(choices *c) { return choose(c, 1) ? DSV4_BF16 : DSV4_F32; }

/* Tasks from the last to the first. */
static void run_backwards(void *context, int64_t count, dsv4_task *task, void *argument) {
    (void)context;
    while (count-- > 0) {
        task(argument, count);
    }
}

static engine choose_engine(const model *m, choices *c) {
    dsv4_parallel parallel = {run_backwards, NULL, 1 + choose(c, 4)};
    return engine_new(m, dsv4_isa_name(choose(c, isa_count() - 1)), &parallel);
}

static stream choose_stream(scene *s, int index, choices *c) {
    static const int64_t positions[] = {0, 1, 65535, 1048575, (int64_t)1 << 31, ((int64_t)1 << 61) + 3};
    stream t = {0};
    t.token = index * s->tokens;
    t.entry = index * s->entries;
    t.position = positions[choose(c, 5)];
    t.depth = choose(c, 3) * choose(c, 12);
    t.spare_depth = choose(c, 24);
    t.state = workbench_state(&s->w, t.depth);
    t.spare = workbench_state(&s->w, t.spare_depth);
    return t;
}

/* One sequence alone, against the oracle. */
static void judge(const scene *s, const stream *t) {
    sequence alone = s->w.s;
    size_t row = (size_t)s->w.config.hidden_dim * dsv4_dtype_size(alone.dtype);
    alone.x = (unsigned char *)alone.x + (size_t)t->token * row;
    alone.tokens = s->tokens;
    alone.position = t->position;
    results r = results_new(&s->w.config, DSV4_F32, s->tokens, s->entries);
    REQUIRE(compress_whole(&s->w.e, &alone, &r, NULL) == DSV4_OK);
    stray_number verdict = oracle_judge_leaning(&s->w.m, &alone, &r, 4); /* there will be millions of sums */
    if (verdict.stage != STAGE_COUNT) {
        fprintf(stderr, "%s %lld: %.9g, not from %.9g to %.9g\n", stage_name(verdict.stage), (long long)verdict.index,
                verdict.got, verdict.least, verdict.greatest);
    }
    REQUIRE(verdict.stage == STAGE_COUNT);
    results_free(&r);
}

static void compress_both(const scene *s) {
    dsv4_segment segments[STREAMS];
    for (int i = 0; i < STREAMS; i++) {
        const stream *t = &s->streams[i];
        segments[i] = segment_new(t->token, s->tokens, t->position, t->entry, NULL);
    }
    dsv4_batch batch = batch_new(&s->w.s, &s->w.whole, segments, STREAMS);
    REQUIRE(workbench_compress(&s->w, &batch) == DSV4_OK);
}

static scene choose_scene(choices *c) {
    static const float scales[] = {1, 0, 1e-3f, 50};
    scene s = {0};
    uint64_t seed = (uint64_t)choose(c, 255);
    dsv4_dtype dtype = choose_dtype(c), out_dtype = choose_dtype(c);
    dsv4_config config = choose_config(c);
    s.w.m = keep_model(&s.w, model_of(&config, choose_dtype(c), seed));
    for (int i = 0; i < ENGINES; i++) {
        s.engines[i] = keep_engine(&s.w, choose_engine(&s.w.m, c));
    }
    s.w.e = s.engines[0];
    s.w.config = config;
    s.w.out_dtype = out_dtype;
    s.entries = MOST_TOKENS / config.ratio;
    s.tokens = s.entries * config.ratio;
    s.w.entries = STREAMS * s.entries;
    s.w.s.tokens = STREAMS * s.tokens;
    s.w.s.dtype = dtype;
    const int64_t numbers = s.w.s.tokens * config.hidden_dim;
    s.w.s.x = keep(&s.w, random_array(dtype, numbers, seed + 1000, scales[choose(c, 3)]));
    s.w.whole = workbench_results(&s.w);
    for (int i = 0; i < STREAMS; i++) {
        s.streams[i] = choose_stream(&s, i, c);
    }
    compress_both(&s);
    judge(&s, &s.streams[0]);
    return s;
}

/* ---- What can happen --------------------------------------------------------------------------------------- */

/* The rows of one segment, from what is expected to where the call should put the same. */
static void expect_rows(const scene *s, const dsv4_segment *segment, int64_t entries, const results *wanted) {
    for (int i = 0; i < STAGE_COUNT; i++) {
        int by_token = i == STAGE_KV || i == STAGE_GATE;
        int64_t rows = by_token ? s->w.whole.tokens : s->w.whole.entries;
        size_t row = rows ? s->w.whole.bytes[i] / (size_t)rows : 0;
        size_t from = row * (size_t)(by_token ? segment->token : segment->entry);
        size_t size = row * (size_t)(by_token ? segment->count : entries);
        memcpy((unsigned char *)wanted->stage[i] + from, (unsigned char *)s->w.whole.stage[i] + from, size);
    }
}

/* The given streams go on in one call. A position that is off by one makes it fail, and then nothing may change. */
static void advance(scene *s, const engine *e, stream *const *streams, int count, choices *c) {
    dsv4_segment segments[STREAMS];
    int64_t ratio = s->w.config.ratio;
    int fail = choose(c, 7) == 7 && streams[count - 1]->seen > 0;
    results wanted = results_new(&s->w.config, s->w.out_dtype, s->w.s.tokens, s->w.entries);
    results got = results_new(&s->w.config, s->w.out_dtype, s->w.s.tokens, s->w.entries);
    for (int i = 0; i < count; i++) {
        stream *t = streams[i];
        int64_t tokens = choose(c, choose(c, 1) ? 3 : MOST_TOKENS);
        tokens = tokens < s->tokens - t->seen ? tokens : s->tokens - t->seen;
        int64_t entries = (t->seen + tokens) / ratio - t->seen / ratio;
        REQUIRE(dsv4_entry_count(&s->w.config, t->state, tokens) == entries);
        *got.no_weights |= !has_weights(&s->w.config, t->state, tokens);
        segments[i] =
            segment_new(t->token + t->seen, tokens, t->position + t->seen, t->entry + t->seen / ratio, t->state);
        if (!fail) {
            expect_rows(s, &segments[i], entries, &wanted);
            t->seen += tokens;
            t->reach = t->reach + tokens < t->depth ? t->reach + tokens : t->depth;
        }
    }
    segments[count - 1].position += fail;
    dsv4_batch batch = batch_new(&s->w.s, &got, segments, count);
    if (*got.no_weights) batch.stages.weights = NULL;
    dsv4_status status = dsv4_compress(e->compressor, &batch, e->workspace, NULL);
    REQUIRE(status == (fail ? DSV4_ERROR_STATE : DSV4_OK));
    REQUIRE(results_difference(&wanted, &got) == STAGE_COUNT);
    results_free(&wanted);
    results_free(&got);
}

/* The spare state, which has become the same stream, takes over. */
static void swap_spare(stream *t) {
    dsv4_state *state = t->state;
    int64_t depth = t->depth;
    t->state = t->spare;
    t->spare = state;
    t->depth = t->spare_depth;
    t->spare_depth = depth;
    t->reach = t->reach < t->depth ? t->reach : t->depth;
}

static void save_and_restore(stream *t) {
    size_t size = dsv4_state_save_size(t->state), written = 0;
    void *bytes = reserve(size);
    REQUIRE(dsv4_state_save(t->state, bytes, size - 1, NULL, NULL) == DSV4_ERROR_BUFFER);
    REQUIRE(dsv4_state_save(t->state, bytes, size, &written, NULL) == DSV4_OK && written == size);
    REQUIRE(dsv4_state_restore(t->spare, bytes, size, NULL) == DSV4_OK);
    free(bytes);
    swap_spare(t);
}

static void roll_back(stream *t, int64_t tokens) {
    dsv4_status status = dsv4_state_roll_back(t->state, tokens, NULL);
    REQUIRE(status == (tokens <= t->reach ? DSV4_OK : DSV4_ERROR_DEPTH));
    if (status == DSV4_OK) {
        t->seen -= tokens;
        t->reach -= tokens;
    }
}

static void one_event(scene *s, choices *c) {
    int first = choose(c, STREAMS - 1);
    stream *t = &s->streams[first], *both[STREAMS] = {t, &s->streams[!first]};
    const engine *e = &s->engines[choose(c, ENGINES - 1)];
    int event = choose(c, 9);
    if (event == 0) {
        save_and_restore(t);
    } else if (event == 1) {
        REQUIRE(dsv4_state_copy(t->spare, t->state, NULL) == DSV4_OK);
        swap_spare(t);
    } else if (event == 2) {
        REQUIRE(dsv4_state_reset(t->state, NULL) == DSV4_OK);
        t->seen = t->reach = 0;
    } else if (event <= 4) {
        roll_back(t, choose(c, 30));
    } else {
        advance(s, e, both, event <= 6 ? 2 : 1, c);
    }
    for (int i = 0; i < STREAMS; i++) {
        REQUIRE(dsv4_state_tokens(both[i]->state) == both[i]->seen);
        REQUIRE(both[i]->seen == 0 || dsv4_state_position(both[i]->state) == both[i]->position + both[i]->seen);
        REQUIRE(dsv4_state_reach(both[i]->state) == both[i]->reach);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    choices c = {data, data + size};
    scene s = choose_scene(&c);
    while (c.at < c.end) {
        one_event(&s, &c);
    }
    workbench_free(&s.w);
    return 0;
}
