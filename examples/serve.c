/* serve.c - a serving loop: several sequences side by side, prompts in chunks, speculative decoding with roll back.
 *
 * In each step one call of dsv4_compress takes a segment from every sequence: the next chunk of a prompt, or the last
 * accepted token with DRAFTS guesses behind it. Guesses that turn out wrong are rolled back, their entries forgotten.
 * At the end every sequence's entries are compared with those of decoding it alone, one token a call. */
#define _POSIX_C_SOURCE 200809L
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "demo.h"

#include <string.h>

enum { SEQUENCES = 6, LENGTH = 96, DRAFTS = 5, CHUNK = 16, HIDDEN = 256, HEAD = 64 };

typedef struct sequence {
    uint64_t seed;
    int64_t prompt;
    int64_t accepted; /* tokens */
    dsv4_state *state;
    dsv4_bf16 entries[LENGTH][HEAD]; /* its cache: as many as dsv4_visible_entries says hold */
} sequence;

typedef struct server {
    dsv4_config config;
    dsv4_compressor *compressor;
    dsv4_workspace *workspace;
    sequence sequences[SEQUENCES];
    int64_t calls, tokens, rolled_back;
} server;

/* The model's part: hidden states of the true tokens, and of guesses that are wrong. */
static void true_token(const sequence *s, int64_t t, dsv4_bf16 *row) { demo_hidden_state(row, HIDDEN, s->seed, t); }

static void wrong_token(const sequence *s, int64_t t, dsv4_bf16 *row) {
    demo_hidden_state(row, HIDDEN, s->seed + 1000, t);
}

/* How many of `drafts` guesses the model finds right. */
static int64_t right_guesses(const sequence *s, int64_t drafts) {
    return (int64_t)(demo_bits(s->seed * 1000 + (uint64_t)s->accepted) >> 40) % (drafts + 1);
}

static int check(dsv4_status status, const dsv4_error *error) {
    if (status != DSV4_OK) fprintf(stderr, "serve: %s\n", error->text);
    return status != DSV4_OK;
}

/* A batch's rows, and where each sequence's entries of it go. */
typedef struct step {
    dsv4_bf16 x[SEQUENCES * CHUNK][HIDDEN], out[SEQUENCES * CHUNK][HEAD];
    dsv4_segment segments[SEQUENCES];
    int64_t right[SEQUENCES]; /* tokens of the segment that turn out true */
    sequence *owner[SEQUENCES];
    int64_t count, tokens, entries;
} step;

/* Adds the tokens that sequence s sends into this step. */
static void add_segment(const server *v, step *r, sequence *s) {
    const int64_t left = LENGTH - s->accepted;
    const int in_prompt = s->accepted < s->prompt;
    const int64_t most = in_prompt ? (s->prompt - s->accepted < CHUNK ? s->prompt - s->accepted : CHUNK) : 1 + DRAFTS;
    const int64_t count = most < left ? most : left;
    if (count == 0) return;
    r->right[r->count] = in_prompt ? count : 1 + right_guesses(s, count - 1);
    for (int64_t i = 0; i < count; i++) {
        (i < r->right[r->count] ? true_token : wrong_token)(s, s->accepted + i, r->x[r->tokens + i]);
    }
    r->owner[r->count] = s;
    r->segments[r->count++] = (dsv4_segment){
        .token = r->tokens, .count = count, .position = s->accepted, .entry = r->entries, .state = s->state};
    r->tokens += count;
    r->entries += dsv4_entry_count(&v->config, s->state, count);
}

/* Takes over the entries of the true tokens and forgets the others. */
static int settle(server *v, const step *r, int64_t i) {
    dsv4_error error;
    sequence *s = r->owner[i];
    const int64_t ratio = v->config.ratio, wrong = r->segments[i].count - r->right[i];
    const int64_t had = dsv4_visible_entries(s->accepted - 1, ratio);
    s->accepted += r->right[i];
    const int64_t has = dsv4_visible_entries(s->accepted - 1, ratio);
    memcpy(s->entries[had], r->out[r->segments[i].entry], (size_t)(has - had) * sizeof *s->entries);
    v->rolled_back += wrong;
    return check(dsv4_state_roll_back(s->state, wrong, &error), &error);
}

static int compress(server *v, const void *x, int64_t tokens, void *out, int64_t entries, const dsv4_segment *segments,
                    int64_t count) {
    dsv4_error error;
    const dsv4_batch batch = {.x = {x, DSV4_BF16, 0},
                              .tokens = tokens,
                              .out = {out, DSV4_BF16, 0},
                              .entries = entries,
                              .segments = segments,
                              .segment_count = count};
    v->calls++;
    v->tokens += tokens;
    return check(dsv4_compress(v->compressor, &batch, v->workspace, &error), &error);
}

/* One call for all sequences; *busy says whether any had something to do. */
static int serve_step(server *v, step *r, int *busy) {
    r->count = r->tokens = r->entries = 0;
    for (int i = 0; i < SEQUENCES; i++) add_segment(v, r, &v->sequences[i]);
    *busy = r->count > 0;
    if (*busy && compress(v, r->x, r->tokens, r->out, r->entries, r->segments, r->count)) return 1;
    for (int64_t i = 0; i < r->count; i++) {
        if (settle(v, r, i)) return 1;
    }
    return 0;
}

/* Decodes a sequence alone, token by token, and counts its entries that differ. */
static int compare(server *v, const sequence *s, int64_t *differ) {
    const dsv4_allocator heap = dsv4_heap();
    dsv4_state *state = NULL;
    dsv4_error error;
    int failed = check(dsv4_state_create(v->compressor, 0, &heap, &state, &error), &error);
    for (int64_t t = 0; t < LENGTH && !failed; t++) {
        dsv4_bf16 x[HIDDEN], out[HEAD];
        const dsv4_segment one = {.count = 1, .position = t, .state = state};
        const int64_t entries = dsv4_entry_count(&v->config, state, 1);
        true_token(s, t, x);
        failed = compress(v, x, 1, out, entries, &one, 1);
        if (entries && memcmp(out, s->entries[t / v->config.ratio], sizeof out) != 0) ++*differ;
    }
    dsv4_state_destroy(state);
    return failed;
}

static int start(server *v) {
    const dsv4_allocator heap = dsv4_heap();
    dsv4_error error;
    v->compressor = demo_compressor(&v->config, 1);
    if (!v->compressor || check(dsv4_workspace_create(v->compressor, NULL, &heap, &v->workspace, &error), &error))
        return 1;
    for (int i = 0; i < SEQUENCES; i++) {
        sequence *s = &v->sequences[i];
        s->seed = (uint64_t)i + 1;
        s->prompt = 7 + 13 * i; /* of different lengths, so that windows close at different times */
        if (check(dsv4_state_create(v->compressor, DRAFTS, &heap, &s->state, &error), &error)) return 1;
    }
    return 0;
}

static void stop(server *v) {
    for (int i = 0; i < SEQUENCES; i++) dsv4_state_destroy(v->sequences[i].state);
    dsv4_workspace_destroy(v->workspace);
    dsv4_compressor_destroy(v->compressor);
}

static int serve(const char *name, int64_t ratio, int overlap) {
    static server v;
    static step r;
    int busy = 1;
    int64_t differ = 0;
    v = (server){
        .config = {.hidden_dim = HIDDEN, .head_dim = HEAD, .ratio = ratio, .rope_dim = 32, .overlap = overlap}};
    v.config.rounding = DSV4_ROUNDING_DEEPSEEK;
    int failed = start(&v);
    while (!failed && busy) failed = serve_step(&v, &r, &busy);
    const int64_t entries = SEQUENCES * (LENGTH / ratio), calls = v.calls, tokens = v.tokens;
    for (int i = 0; i < SEQUENCES && !failed; i++) failed = compare(&v, &v.sequences[i], &differ);
    if (!failed) {
        printf("%s, %d sequences: %lld tokens in %lld calls, %lld of them guesses rolled back; ", name, SEQUENCES,
               (long long)tokens, (long long)calls, (long long)v.rolled_back);
        if (differ) {
            printf("%lld of %lld entries DIFFER from serial decoding\n", (long long)differ, (long long)entries);
        } else {
            printf("all %lld entries equal serial decoding\n", (long long)entries);
        }
    }
    stop(&v);
    return failed || differ;
}

int main(void) {
    const int csa = serve("CSA, ratio 4", 4, 1), hca = serve("HCA, ratio 16", 16, 0);
    return csa || hca;
}
