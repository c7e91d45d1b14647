/* A server at work: requests arrive, their prompts come in chunks, they decode side by side, speculate and take
 * back, are cancelled, moved as bytes and as copies (real threads: pthread). Some calls are given projections, some are
 * asked for weights. Every entry has the bits of the one
 * call, and memory is what was created and no more. SOAK_SECONDS in the environment: how long (1). */

#define _POSIX_C_SOURCE 200809L

#include <time.h>

#include "runner.h"
#include "oracle_support.h"
#include "workbench.h"
#include "threads.h"

enum { SLOTS = 6, CALLS = 60, SEEN = 1 };

static struct {
    int64_t episodes, calls, tokens, entries, judged;
    size_t peak;
} tally;

/* A request under way. */
typedef struct request {
    sequence s;       /* all the tokens it will come to */
    results expected; /* of the one call */
    char *seen;       /* [entries] */
    int64_t prompt;   /* tokens that come in chunks */
    int64_t depth;
    dsv4_state *state;      /* NULL: the slot is free */
    int64_t fed, kept;      /* tokens in this call, and how many of these are right */
    int64_t entry, entries; /* rows of out in this call */
} request;

/* One episode: a compressor of some shape, kernel set and parallel-for, and its requests. */
typedef struct server {
    workbench w; /* its engine is what the other one is compared with; its sequence the call's, NaN between segments */
    const shape *of;
    engine e; /* from `book` */
    ledger book;
    dsv4_allocator allocator;
    team team;
    dice d;
    request slot[SLOTS];
    int64_t chunk; /* tokens of one segment at most */
    results out;
    results projected;   /* kv and gate of x */
    dsv4_state *scratch; /* that they are made with */
    int64_t created;     /* objects asked of `book` */
    size_t base;         /* bytes of compressor and workspace */
    const char *wrong;   /* what did not hold, NULL so far */
} server;

static int holds(server *v, int condition, const char *what) {
    if (!condition && !v->wrong) v->wrong = what;
    return condition;
}

static int one_in(server *v, int64_t n) { return dice_below(&v->d, n) == 0; }
static size_t x_row(const server *v) { return (size_t)v->w.config.hidden_dim * dsv4_dtype_size(v->of->x); }
static size_t out_row(const server *v) { return (size_t)v->w.config.head_dim * dsv4_dtype_size(v->of->out); }
static char *row_of(void *data, int64_t row, size_t bytes) { return (char *)data + (size_t)row * bytes; }

/* ---- Objects ----------------------------------------------------------------------------------------------- */

static server server_new(const shape *of, uint64_t seed) {
    server v = {0};
    v.of = of;
    v.d.state = seed;
    v.chunk = 2 * of->config.ratio + 5;
    v.w = workbench_with(shape_model(of, seed), shape_sequence(of, SLOTS * (v.chunk + 3), seed), of->out);
    v.out = keep_results(&v.w, results_new(&v.w.config, of->out, v.w.s.tokens, v.w.s.tokens));
    v.projected = keep_results(&v.w, results_new(&v.w.config, of->out, v.w.s.tokens, v.w.s.tokens));
    return v;
}

/* Its objects refer to it, so it must lie where it will stay. */
static void server_start(server *v) {
    const int sets = isa_count();
    dsv4_options options = {0};
    options.isa = dsv4_isa_name((int)dice_below(&v->d, sets));
    const dsv4_parallel parallel = schedule_parallel(&schedules[dice_below(&v->d, SCHEDULE_COUNT)], &v->team);
    v->allocator = ledger_allocator(&v->book);
    v->w.e = workbench_engine(&v->w, dsv4_isa_name((int)dice_below(&v->d, sets)), NULL);
    v->scratch = workbench_state(&v->w, 0);
    holds(v, !dsv4_compressor_create(&v->w.config, &v->w.m.params, &options, &v->allocator, &v->e.compressor, NULL),
          "create");
    holds(v, !dsv4_workspace_create(v->e.compressor, &parallel, &v->allocator, &v->e.workspace, NULL), "create");
    v->created = 2;
    v->base = v->book.live_bytes;
}

/* A state, sometimes at the second try, the first finding no memory. */
static dsv4_state *state_for(server *v, int64_t depth) {
    dsv4_state *state = NULL;
    if (one_in(v, 8)) {
        v->created++;
        v->book.fail_at = v->book.calls + 1;
        const dsv4_status status = dsv4_state_create(v->e.compressor, depth, &v->allocator, &state, NULL);
        holds(v, status == DSV4_ERROR_MEMORY && !state, "a state without memory is refused");
    }
    v->created++;
    holds(v, !dsv4_state_create(v->e.compressor, depth, &v->allocator, &state, NULL), "create");
    return state;
}

/* A sample of what the others are compared with is held against the oracle. */
static void judge(server *v, const request *q) {
    sequence windows = q->s; /* without the tail, which gives nothing */
    windows.tokens = q->expected.entries * v->w.config.ratio;
    results wide = results_new(&v->w.config, DSV4_F32, windows.tokens, q->expected.entries);
    holds(v, !compress_whole(&v->w.e, &windows, &wide, NULL), "the one call");
    holds(v, oracle_judge_leaning(&v->w.m, &windows, &wide, 4).stage == STAGE_COUNT,
          "the oracle agrees with the one call");
    for (int64_t i = 0; i < wide.count[STAGE_OUT]; i++) {
        float value = ((float *)wide.stage[STAGE_OUT])[i];
        if (v->of->out == DSV4_BF16) value = dsv4_bf16_to_f32(dsv4_bf16_from_f32(value));
        holds(v, (double)value == result(&q->expected, STAGE_OUT, i), "out is the fp32 entry in its own type");
    }
    tally.judged++;
    results_free(&wide);
}

static void arrive(server *v, request *q) {
    const int64_t tokens = 1 + dice_below(&v->d, 8 * v->w.config.ratio + 20), entries = tokens / v->w.config.ratio;
    q->s = shape_sequence(v->of, tokens, dice_next(&v->d));
    q->s.position = one_in(v, 4) ? ((int64_t)1 << 31) - dice_below(&v->d, tokens + 1) : dice_below(&v->d, 1 << 20);
    q->expected = results_new(&v->w.config, v->of->out, tokens, entries);
    q->seen = memset(reserve((size_t)entries), 0, (size_t)entries);
    q->prompt = dice_below(&v->d, tokens + 1);
    q->depth = dice_below(&v->d, 2 * v->w.config.ratio + 3);
    q->state = state_for(v, q->depth);
    holds(v, !compress_whole(&v->w.e, &q->s, &q->expected, NULL), "the one call");
    if (v->w.config.ratio < 100 && one_in(v, 16)) judge(v, q);
}

static void leave(server *v, request *q) {
    if (dsv4_state_tokens(q->state) == q->s.tokens)
        for (int64_t i = 0; i < q->expected.entries; i++) holds(v, q->seen[i] == SEEN, "each entry came out");
    dsv4_state_destroy(q->state);
    free(q->seen);
    results_free(&q->expected);
    sequence_free(&q->s);
    memset(q, 0, sizeof *q);
}

static void server_free(server *v) {
    for (int i = 0; i < SLOTS; i++)
        if (v->slot[i].state) leave(v, &v->slot[i]);
    engine_free(&v->e);
    holds(v, v->book.live == 0 && v->book.live_bytes == 0 && !v->book.wrong,
          "everything was given back, as it was asked for");
    workbench_free(&v->w);
}

/* ---- A call ------------------------------------------------------------------------------------------------ */

/* A piece of the prompt, drafts of which some are right, or one token; or the request sits this call out. */
static void plan(server *v, request *q) {
    const int64_t left = q->s.tokens - dsv4_state_tokens(q->state), ahead = q->prompt - dsv4_state_tokens(q->state);
    q->fed = q->kept = 0;
    if (!q->state || one_in(v, 4)) return;
    if (ahead > 0) {
        q->fed = q->kept = 1 + dice_below(&v->d, least(ahead, v->chunk));
    } else if (q->depth > 0 && one_in(v, 2)) {
        q->fed = 1 + dice_below(&v->d, least(q->depth, v->chunk));
        q->kept = least(left, dice_below(&v->d, q->fed + 1));
    } else {
        q->fed = q->kept = 1;
    }
}

/* Lays the request's rows into x from `row` on; wrong drafts are other tokens, or not even numbers. */
static void lay(server *v, const request *q, int64_t row) {
    const int64_t done = dsv4_state_tokens(q->state);
    const int none = one_in(v, 4);
    for (int64_t i = 0; i < q->fed; i++) {
        char *to = row_of(v->w.s.x, row + i, x_row(v));
        if (i < q->kept)
            memcpy(to, row_of(q->s.x, done + i, x_row(v)), x_row(v));
        else if (none)
            memset(to, 0xFF, x_row(v));
        else
            for (int64_t k = 0; k < v->w.config.hidden_dim; k++) set_number(to, v->of->x, k, 3 * dice_real(&v->d));
    }
}

/* The segments of a call, beginning with any slot, with gaps in x and out. Returns how many. */
static int gather(server *v, dsv4_segment segments[SLOTS]) {
    const int first = (int)dice_below(&v->d, SLOTS);
    int64_t row = 0, entry = 0;
    int count = 0;
    memset(v->w.s.x, 0xFF, (size_t)v->w.s.tokens * x_row(v));
    for (int i = 0; i < SLOTS; i++) {
        request *q = &v->slot[(first + i) % SLOTS];
        plan(v, q);
        if (q->fed == 0) continue;
        row += dice_below(&v->d, 3);
        entry += dice_below(&v->d, 3);
        lay(v, q, row);
        q->entry = entry;
        q->entries = dsv4_entry_count(&v->w.config, q->state, q->fed);
        segments[count++] = segment_new(row, q->fed, q->s.position + dsv4_state_tokens(q->state), entry, q->state);
        row += q->fed;
        entry += q->entries;
        tally.tokens += q->fed;
    }
    return count;
}

/* Entries of windows whose tokens were all right are those of the one call; drafts are taken back. */
static void compare(server *v, request *q) {
    const int64_t done = dsv4_state_tokens(q->state) - q->fed, first = done / v->w.config.ratio;
    for (int64_t i = 0; i < q->entries; i++) {
        char *got = row_of(v->out.stage[STAGE_OUT], q->entry + i, out_row(v));
        if ((first + i + 1) * v->w.config.ratio <= done + q->kept) {
            const char *expected = row_of(q->expected.stage[STAGE_OUT], first + i, out_row(v));
            holds(v, !memcmp(expected, got, out_row(v)), "an entry has the bits of the one call");
            q->seen[first + i] = SEEN;
            tally.entries++;
        }
        memset(got, POISON, out_row(v));
    }
    holds(v, !dsv4_state_roll_back(q->state, q->fed - q->kept, NULL), "drafts can be taken back");
    holds(v, dsv4_state_tokens(q->state) == done + q->kept, "a state counts its tokens");
}

/* Puts projections into the batch in place of x. */
static void project(server *v, dsv4_batch *b) {
    const results *to = &v->projected;
    const dsv4_segment all = segment_new(0, v->w.s.tokens, 0, 0, v->scratch);
    dsv4_batch whole = batch_new(&v->w.s, to, &all, 1);
    memset(&whole.stages, 0, sizeof whole.stages);
    whole.stages.kv = to->stage[STAGE_KV];
    whole.stages.gate = v->w.config.no_gate ? NULL : to->stage[STAGE_GATE];
    holds(v, !dsv4_state_reset(v->scratch, NULL) && !workbench_compress(&v->w, &whole), "projections of x");
    b->x.data = NULL;
    b->kv = to->stage[STAGE_KV];
    b->gate = whole.stages.gate;
}

static void serve(server *v) {
    dsv4_segment segments[SLOTS];
    const int count = gather(v, segments);
    dsv4_batch b = batch_new(&v->w.s, &v->out, segments, count);
    memset(&b.stages, 0, sizeof b.stages);
    if (count == 0) b.tokens = 0; /* nobody has anything to say */
    if (count > 0 && one_in(v, 4)) project(v, &b);
    if (one_in(v, 4)) b.stages.weights = v->out.stage[STAGE_WEIGHTS];
    dsv4_status status = dsv4_compress(v->e.compressor, &b, v->e.workspace, NULL);
    if (b.stages.weights && status == DSV4_ERROR_STATE) { /* some rows have been folded */
        b.stages.weights = NULL;
        status = dsv4_compress(v->e.compressor, &b, v->e.workspace, NULL);
    }
    if (!holds(v, status == DSV4_OK, "a call")) return;
    for (int i = 0; i < SLOTS; i++)
        if (v->slot[i].fed > 0) compare(v, &v->slot[i]);
    holds(v, memory_untouched(v->out.stage[STAGE_OUT], v->out.bytes[STAGE_OUT]), "no other row is written");
    tally.calls++;
}

/* ---- Between calls ----------------------------------------------------------------------------------------- */

/* To another state, of another depth, as a copy or as bytes; the old one goes. */
static void move(server *v, request *q) {
    const int64_t depth = dice_below(&v->d, 2 * v->w.config.ratio + 3);
    dsv4_state *to = state_for(v, depth);
    if (one_in(v, 2)) {
        holds(v, !dsv4_state_copy(to, q->state, NULL), "copy");
    } else {
        const size_t size = dsv4_state_save_size(q->state);
        void *bytes = reserve(size);
        holds(v, !dsv4_state_save(q->state, bytes, size, NULL, NULL), "save");
        holds(v, !dsv4_state_restore(to, bytes, size, NULL), "restore");
        free(bytes);
    }
    dsv4_state_destroy(q->state);
    q->state = to;
    q->depth = depth;
}

static void something_happens(server *v, request *q) {
    if (!q->state) {
        if (one_in(v, 2)) arrive(v, q);
    } else if (dsv4_state_tokens(q->state) == q->s.tokens || one_in(v, 50)) {
        leave(v, q); /* done, or cancelled */
    } else if (one_in(v, 8)) {
        move(v, q);
    } else if (one_in(v, 16)) { /* an edit: some tokens come again */
        holds(v, !dsv4_state_roll_back(q->state, dice_below(&v->d, dsv4_state_reach(q->state) + 1), NULL), "roll back");
    } else if (one_in(v, 50)) { /* preempted: all come again */
        holds(v, !dsv4_state_reset(q->state, NULL), "reset");
    }
}

/* What is allocated is what was created and is still in use, to the byte. */
static void take_stock(server *v) {
    size_t bytes = v->base;
    int live = 2;
    for (int i = 0; i < SLOTS; i++) {
        size_t size = 0;
        if (!v->slot[i].state) continue;
        holds(v, !dsv4_state_size(v->e.compressor, v->slot[i].depth, &size, NULL), "state size");
        bytes += size;
        live++;
    }
    holds(v, v->book.calls == v->created, "nothing is allocated but by create");
    holds(v, v->book.live == live && v->book.live_bytes == bytes, "memory is what is in use");
    if (bytes > tally.peak) tally.peak = bytes;
}

/* ---- Episodes ---------------------------------------------------------------------------------------------- */

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double soak_seconds(void) {
    const char *given = getenv("SOAK_SECONDS");
    return given && *given ? atof(given) : 1;
}

TEST a_server_gives_the_bits_of_the_one_call_in_constant_memory(void) {
    const double end = seconds() + soak_seconds();
    for (uint64_t seed = 1; seed == 1 || seconds() < end; seed++) {
        const int which = (int)(seed % (SHAPE_COUNT + LONG_SHAPE_COUNT));
        const shape *of = which < SHAPE_COUNT ? &shapes[which] : &long_shapes[which - SHAPE_COUNT];
        server v = server_new(of, seed);
        server_start(&v);
        for (int call = 0; call < CALLS && !v.wrong; call++) {
            for (int i = 0; i < SLOTS; i++) something_happens(&v, &v.slot[i]);
            serve(&v);
            take_stock(&v);
        }
        server_free(&v);
        tally.episodes++;
        ASSERTm(note("%s, seed %d, does not hold: %s", of->name, (int)seed, v.wrong ? v.wrong : ""), !v.wrong);
    }
    PASS();
}

SUITE(soak) {
    RUN_TEST(a_server_gives_the_bits_of_the_one_call_in_constant_memory);
    printf("%lld servers, %lld calls, %lld tokens, %lld entries compared; %lld requests held against the oracle; "
           "at most %zu bytes in use\n",
           (long long)tally.episodes, (long long)tally.calls, (long long)tally.tokens, (long long)tally.entries,
           (long long)tally.judged, tally.peak);
}

TESTS_MAIN(soak);
